"""A new weight file from an old one: all bytes copied, the patched weights' ranges written anew.

Header, metadata and every other tensor stay what they are by construction; the old file is only read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path

from kpatch.checkpoint import files
from kpatch.checkpoint.keys import key_shift
from kpatch.checkpoint.plan import Plan, WeightPlan
from kpatch.checkpoint.rows import Landing, Overflow, blocks, patch_rows, widen
from kpatch.checkpoint.store import AppliedWeight, Store
from kpatch.errors import Damaged, Refused
from kpatch.patch.format import read_delta
from kpatch.patch.manifest import matrix_shape
from kpatch.patch.text import printable
from kpatch.reporter import Reporter

Outcome = tuple[AppliedWeight, Landing | None]


def stage_files(
    plan: Plan, store: Store, targets: Mapping[str, Path], report: Reporter, *, keep_owner: bool = True
) -> dict[str, Outcome]:
    """Write the successor of every file of the plan to `targets[file]`, synced and read back.

    Original bytes not kept yet are put into `store` first. Gives per weight its record and what rounding did.
    Raises Refused when a patched weight does not fit its dtype, Damaged when kept bytes or a patch are not sound.
    """
    outcomes: dict[str, Outcome] = {}
    with report.task("Writing patched weights", sum(plan.stamps[file].size for file in plan.files), "B") as advance:
        for file in plan.files:
            weights = sorted((weight for weight in plan.weights if weight.ref.file == file), key=lambda w: w.ref.begin)
            source = plan.checkpoint.path / file
            with files.open_read(source) as old, files.create(targets[file], 0o600) as new:
                status = os.fstat(old.fileno())
                _copy_around(old, new, status.st_size, weights, advance)
                for weight in weights:
                    if not weight.kept:
                        _keep_base(store, old, weight, status.st_mode & 0o666)
                    outcomes[weight.name] = write_weight(plan, store, new, weight)
                    advance(weight.ref.end - weight.ref.begin)
                if os.fstat(new.fileno()).st_size != status.st_size:
                    raise Damaged(f"The new {printable(file)} has another size than the old one; it was thrown away")
                files.keep_attributes(new, status, owner=keep_owner)
                files.fsync(new)
    return outcomes


def _copy_around(old: FileIO, new: FileIO, size: int, weights: list[WeightPlan], advance: files.Advance) -> None:
    """Bring over everything but the ranges that are written anew; share blocks where the filesystem can."""
    if files.clone(old, new):
        advance(size - sum(weight.ref.end - weight.ref.begin for weight in weights))
        return
    files.reserve(new, size)
    position = 0
    for weight in weights:
        files.copy_range(old, new, position, weight.ref.begin, advance)
        position = weight.ref.end
    files.copy_range(old, new, position, size, advance)


def _keep_base(store: Store, old: FileIO, weight: WeightPlan, mode: int) -> None:
    """Keep a weight's original bytes under their hash, synced and read back before they get that name."""
    path = store.base(weight.base)
    if path.exists():  # two weights with equal bytes; the hash is checked again when it is read
        return
    temporary = path.with_name(path.name + ".tmp")
    files.unlink(temporary)
    length = weight.ref.end - weight.ref.begin
    with files.create(temporary, mode) as kept:
        for begin in range(0, length, files.CHUNK):
            block = files.read_at(old, weight.ref.begin + begin, min(files.CHUNK, length - begin))
            files.write_at(kept, begin, block)
        files.fsync(kept)
        if files.hash_range(kept, 0, length) != weight.base:
            raise Damaged(
                f"The original bytes of {printable(weight.name, 120)} could not be kept",
                details=["what was read back is not what was there when it was checked"],
                hint="another program may be writing to the checkpoint; nothing was changed",
            )
    files.replace(temporary, path)
    files.fsync_dir(path.parent)


def write_weight(plan: Plan, store: Store, new: FileIO, weight: WeightPlan) -> Outcome:
    """Write one weight, its kept original bytes plus its deltas, to its place in a new file; read back.

    Raises Refused when it does not fit its dtype, Damaged when the kept bytes or a patch are not sound.
    """
    ref = weight.ref
    rows, cols = matrix_shape(ref.shape)
    landing = Landing(keys=key_shift([(plan.patches[patch], name) for patch, name in weight.deltas], (rows, cols)))
    row_bytes = (ref.end - ref.begin) // rows
    deltas = [widen(read_delta(plan.patches[patch], name)) for patch, name in weight.deltas]
    before, after = hashlib.sha256(), hashlib.sha256()
    with files.open_read(store.base(weight.base)) as kept:
        for begin, end in blocks((rows, cols)):
            block = files.read_at(kept, begin * row_bytes, (end - begin) * row_bytes)
            before.update(block)
            data = memoryview(block)
            if deltas:
                try:
                    data = patch_rows(block, ref.dtype, cols, (begin, end), deltas, landing)
                except Overflow as error:
                    raise _overflow(weight, error) from None
            after.update(data)
            files.write_at(new, ref.begin + begin * row_bytes, data)
    if before.hexdigest() != weight.base:
        raise Damaged(f"The kept original bytes of {printable(weight.name, 120)} are damaged; nothing was changed")
    if files.hash_range(new, ref.begin, ref.end) != after.hexdigest():
        raise Damaged(f"{printable(weight.name, 120)} was not read back as written; nothing was changed")
    patches = tuple(patch for patch, _ in weight.deltas)
    record = AppliedWeight(ref.dtype, ref.shape, weight.base, after.hexdigest(), patches)
    return record, landing if deltas else None


def _overflow(weight: WeightPlan, error: Overflow) -> Refused:
    return Refused(
        f"{printable(weight.name, 120)} cannot hold the patch as {weight.ref.dtype}",
        details=[f"it would give {error}"],
        hint="apply to a float32 or bfloat16 copy of the checkpoint",
    )
