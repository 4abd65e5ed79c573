"""A patched copy of a checkpoint directory (`apply` with `out`): its place, the space it needs, and its writing.

It is built aside and named by one rename, so that it is there whole or not at all.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from kpatch.checkpoint import files, shards
from kpatch.checkpoint.base_weights import Weights
from kpatch.checkpoint.checks import require_space
from kpatch.checkpoint.commit import system_errors
from kpatch.checkpoint.plan import Plan, warn_ahead
from kpatch.checkpoint.records import Applied, AppliedWeight
from kpatch.checkpoint.stage import Outcome, keep_copies, stage_files
from kpatch.checkpoint.status import logged
from kpatch.checkpoint.store import Store
from kpatch.checkpoint.workplace import name_it, workplace
from kpatch.errors import BadInput
from kpatch.outputs import check_new_directory
from kpatch.patch.container import ITEM_SIZE
from kpatch.patch.fields import FLOAT_DTYPES
from kpatch.reporter import Reporter
from kpatch.text import printable

# What a user calls the dtypes of a copy.
COPY_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def write_copy(
    plan: Plan, weights: Weights, source: Store, out: Path, whole: bool, dtype: str | None, report: Reporter
) -> tuple[str, dict[str, Outcome]]:
    """Write the checkpoint of a plan to `out` with its patches applied; the checkpoint itself is only read.

    Links are followed: the copy holds plain files of its own, and a .kpatch folder, so it can be reverted. `whole`
    writes all weights anew, in `dtype` when that is given. Raises Refused or BadInput as `place_for`.
    """
    target = place_for(out, plan.checkpoint.path)
    with system_errors(target), workplace(target) as folder:
        require_space(folder, *_needs(plan, dtype if whole else None), plan.sample)
        store = Store(folder)
        for inner in (store.bases, store.copies):
            files.mkdir(inner)
        plan = keep_copies(plan, store, plan.stack, report)
        warn_ahead(plan, report)
        if whole:
            from kpatch.checkpoint.convert import write_converted

            skip = {*plan.checkpoint.files, shards.INDEX, shards.PICKLED_INDEX, source.root.name}
            _copy_tree(plan.checkpoint.path, folder, skip, report)
            outcomes = write_converted(plan, weights, store, dtype, report)
            before: dict[str, AppliedWeight] = {}
        else:
            _copy_tree(plan.checkpoint.path, folder, {*plan.files, source.root.name}, report)
            before = dict(plan.before.weights)
            for sha256 in {weight.base for weight in before.values()}:
                files.copy_file(source.base(sha256), store.base(sha256))
            targets = {file: folder / file for file in plan.files}
            outcomes = stage_files(plan, store, targets, report, keep_owner=False)
        store.write_readme()
        records = {**before, **{name: record for name, (record, _) in outcomes.items()}}
        log = logged(plan.before, plan.action, plan.moved)
        store.write_applied(Applied(plan.base, plan.stack, records, log))
        files.set_mode(folder, os.stat(plan.checkpoint.path).st_mode)
        for inner in (store.bases, store.copies, store.root, folder):
            files.fsync_dir(inner)
        plan.require_current(source)
        name_it(folder, target)
    return printable(str(out)), outcomes


def _needs(plan: Plan, dtype: str | None) -> tuple[int, int]:
    """Bytes a copy takes, and those it takes where it can share blocks with the checkpoint."""
    tensors = plan.checkpoint.tensors.values()
    sizes = [(ref.end - ref.begin, ITEM_SIZE[ref.dtype], ref.dtype in FLOAT_DTYPES) for ref in tensors]
    weights = sum(size // item * ITEM_SIZE[dtype] if dtype and is_float else size for size, item, is_float in sizes)
    rest = plan.bytes_written - sum(weight.ref.end - weight.ref.begin for weight in plan.weights)
    return weights + rest, weights + rest if dtype else plan.bytes_written


def place_for(out: Path, model: Path) -> Path:
    """The real path of a copy to be. Raises Refused when it exists (an empty folder may), BadInput for a bad place."""
    check_new_directory(out)
    target = Path(os.path.realpath(out))
    if target == model or model in target.parents:
        raise BadInput(f"{out} lies inside the checkpoint it would be a copy of")
    return target


def _copy_tree(source: Path, target: Path, skip: set[str], report: Reporter) -> None:
    for name in files.names(source):
        if name in skip:
            continue
        path = source / name
        try:
            mode = path.stat().st_mode
        except OSError:
            report.warn(f"{path} leads nowhere and is not in the copy")
            continue
        if stat.S_ISREG(mode):
            files.copy_file(path, target / name)
        elif stat.S_ISDIR(mode) and not path.is_symlink():
            files.mkdir(target / name)
            _copy_tree(path, target / name, set(), report)
            files.set_mode(target / name, mode)
            files.fsync_dir(target / name)
        else:
            report.warn(f"{path} is a link to a folder, or no plain file, and is not in the copy")
