"""`apply -o DIR`: a patched copy of a checkpoint directory, built aside and named by one rename."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from kpatch.checkpoint import files
from kpatch.checkpoint.commit import system_errors
from kpatch.checkpoint.partial import name_it, workplace
from kpatch.checkpoint.plan import Plan
from kpatch.checkpoint.splice import Outcome, stage_files
from kpatch.checkpoint.store import Applied, Store
from kpatch.errors import BadInput, Damaged, Refused
from kpatch.patch.format import verify
from kpatch.patch.text import printable
from kpatch.reporter import Reporter


def write_copy(plan: Plan, source: Store, out: Path, report: Reporter) -> tuple[str, dict[str, Outcome]]:
    """Write the checkpoint of a plan to `out` with its patches applied; the checkpoint itself is only read.

    Links are followed: the copy holds plain files of its own, and a .kpatch folder, so it can be reverted.
    Raises Refused or BadInput as `place_for`.
    """
    target = place_for(out, plan.checkpoint.path)
    with system_errors(target), workplace(target) as folder:
        outcomes = _build(plan, source, folder, report)
        plan.require_current(source)
        name_it(folder, target)
    return printable(str(out)), outcomes


def place_for(out: Path, model: Path) -> Path:
    """The real path of a copy to be. Raises Refused when it exists (an empty folder may), BadInput for a bad place."""
    shown = printable(str(out))
    try:
        target = Path(os.path.realpath(out))
        taken = os.path.lexists(target) and not (target.is_dir() and not files.names(target))
    except (OSError, ValueError) as error:
        raise BadInput(f"{shown} cannot be made", details=[printable(str(error))]) from None
    if taken:
        raise Refused(f"{shown} exists", hint="give -o a new directory")
    if not target.parent.is_dir():
        raise BadInput(f"{shown} cannot be made: there is no folder {printable(str(target.parent))}")
    if target == model or model in target.parents:
        raise BadInput(f"{shown} lies inside the checkpoint it would be a copy of")
    return target


def _build(plan: Plan, source: Store, folder: Path, report: Reporter) -> dict[str, Outcome]:
    _copy_tree(plan.checkpoint.path, folder, {*plan.files, source.root.name}, report)
    store = Store(folder)
    for inner in (store.bases, store.copies):
        files.mkdir(inner)
    for sha256 in {weight.base for weight in plan.before.weights.values()}:
        files.copy_file(source.base(sha256), store.base(sha256))
    for patch in plan.stack:
        files.copy_file(plan.patches[patch.id].path, store.copy(patch.id), keep_mode=False)
        if verify(store.copy(patch.id)).id != patch.id:
            raise Damaged(f"{printable(patch.name)} changed while it was being read")
    outcomes = stage_files(plan, store, {file: folder / file for file in plan.files}, report, keep_owner=False)
    weights = {**plan.before.weights, **{name: record for name, (record, _) in outcomes.items()}}
    store.write_readme()
    store.write_applied(Applied(plan.base, plan.stack, weights))
    files.set_mode(folder, os.stat(plan.checkpoint.path).st_mode)
    for inner in (store.bases, store.copies, store.root, folder):
        files.fsync_dir(inner)
    return outcomes


def _copy_tree(source: Path, target: Path, skip: set[str], report: Reporter) -> None:
    for name in files.names(source):
        if name in skip:
            continue
        path = source / name
        try:
            mode = path.stat().st_mode
        except OSError:
            report.warn(f"{printable(str(path))} leads nowhere and is not in the copy")
            continue
        if stat.S_ISREG(mode):
            files.copy_file(path, target / name)
        elif stat.S_ISDIR(mode) and not path.is_symlink():
            files.mkdir(target / name)
            _copy_tree(path, target / name, set(), report)
            files.set_mode(target / name, mode)
            files.fsync_dir(target / name)
        else:
            report.warn(f"{printable(str(path))} is a link to a folder, or no plain file, and is not in the copy")
