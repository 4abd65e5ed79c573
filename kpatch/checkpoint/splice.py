"""A new weight file from an old one: all bytes copied, the patched weights' ranges written anew.

Header, metadata and every other tensor stay what they are by construction; the old file is only read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path

from kpatch.checkpoint import files
from kpatch.checkpoint.keys import key_shift
from kpatch.checkpoint.plan import Plan, WeightPlan
from kpatch.checkpoint.rows import Landing, Overflow, blocks, one_thread_each, patch_rows, widen
from kpatch.checkpoint.store import AppliedWeight, Store
from kpatch.errors import Damaged, Refused
from kpatch.patch.format import read_delta
from kpatch.patch.manifest import matrix_shape
from kpatch.patch.text import printable
from kpatch.reporter import Reporter

Outcome = tuple[AppliedWeight, Landing | None]

# Weights that are computed at a time, where there are as many processors; each takes some 30 MB of memory.
_WORKERS = 4
# Bytes that are copied before it is asked again whether to go on.
_STEP = 1 << 26


def stage_files(
    plan: Plan, store: Store, targets: Mapping[str, Path], report: Reporter, *, keep_owner: bool = True
) -> dict[str, Outcome]:
    """Write the successor of every file of the plan to `targets[file]`, synced and read back.

    Original bytes not kept yet are put into `store` first. Gives per weight its record and what rounding did.
    Raises Refused when a patched weight does not fit its dtype, Damaged when kept bytes or a patch are not sound.
    """
    outcomes: dict[str, Outcome] = {}
    amount = sum(plan.stamps[file].size for file in plan.files)
    with report.task("Writing patched weights", amount, "B") as advance, ExitStack() as stack:
        pairs = [_begin(plan, file, targets[file], stack) for file in plan.files]
        rest = [pair for pair in pairs if not files.clone(pair.old, pair.new)]
        for pair in rest:
            files.reserve(pair.new, pair.status.st_size)
        # Weights with the same bytes keep them in one file, so they follow each other.
        groups: dict[str, list[tuple[_Pair, WeightPlan]]] = {}
        for pair in pairs:
            for weight in pair.weights:
                groups.setdefault(weight.base, []).append((pair, weight))

        def write(group: Sequence[tuple[_Pair, WeightPlan]]) -> None:
            for pair, weight in group:
                with _kept(store, pair.old, weight, pair.status.st_mode & 0o666) as kept:
                    outcomes[weight.name] = write_weight(plan, kept, pair.new, weight)
                advance(weight.ref.end - weight.ref.begin)

        # The bytes between the weights are copied, which is the system's work, while the weights are computed.
        with files.background(lambda stopped: _copy_rest(rest, stopped, advance)), one_thread_each():
            tasks = [partial(write, group) for group in groups.values()]
            files.in_parallel(tasks, min(_WORKERS, files.processors()))
        for pair in pairs:
            if os.fstat(pair.new.fileno()).st_size != pair.status.st_size:
                raise Damaged(
                    f"The new {printable(pair.source.name)} has another size than the old one; it was thrown away"
                )
            files.keep_attributes(pair.new, pair.status, owner=keep_owner)
            files.fsync(pair.new)
    return outcomes


@dataclass(frozen=True)
class _Pair:
    """A weight file and its successor, both open; the weights to be written anew in the order of their places."""

    source: Path
    target: Path
    old: FileIO
    new: FileIO
    status: os.stat_result
    weights: list[WeightPlan]


def _begin(plan: Plan, file: str, target: Path, stack: ExitStack) -> _Pair:
    source = plan.checkpoint.path / file
    old = stack.enter_context(files.open_read(source))
    new = stack.enter_context(files.create(target, 0o600))
    weights = sorted((weight for weight in plan.weights if weight.ref.file == file), key=lambda one: one.ref.begin)
    return _Pair(source, target, old, new, os.fstat(old.fileno()), weights)


def _copy_rest(pairs: Sequence[_Pair], stopped: Callable[[], bool], advance: files.Advance) -> None:
    """Bring over everything but the ranges that are written anew. Opens the files for itself, to run beside others."""
    for pair in pairs:
        with files.open_read(pair.source) as old, files.open_write(pair.target) as new:
            position = 0
            for begin, end in [*((weight.ref.begin, weight.ref.end) for weight in pair.weights), (None, None)]:
                until = pair.status.st_size if begin is None else begin
                while position < until and not stopped():
                    step = min(until, position + _STEP)
                    files.copy_range(old, new, position, step, advance)
                    position = step
                position = position if end is None else end


@contextmanager
def _kept(store: Store, old: FileIO, weight: WeightPlan, mode: int) -> Iterator[FileIO]:
    """A weight's original bytes for reading, kept; where they are not yet, they are copied to the store and synced.

    Only when the block has read them back, and found them to be what they should, do they get the name of their hash.
    """
    path = store.base(weight.base)
    if weight.kept or path.exists():  # exists: of two weights with equal bytes
        with files.open_read(path) as kept:
            yield kept
        return
    temporary = path.with_name(path.name + ".tmp")
    files.unlink(temporary)
    with files.create(temporary, mode) as kept:
        files.copy_range(old, kept, weight.ref.begin, weight.ref.end, to=0)
        files.fsync(kept)
        yield kept
    files.replace(temporary, path)


def write_weight(plan: Plan, kept: FileIO, new: FileIO, weight: WeightPlan) -> Outcome:
    """Write one weight, its kept original bytes plus its deltas, to its place in a new file; every block is read back.

    Raises Refused when it does not fit its dtype, Damaged when the kept bytes or a patch are not sound.
    """
    ref = weight.ref
    rows, cols = matrix_shape(ref.shape)
    row_bytes = (ref.end - ref.begin) // rows
    deltas = [widen(read_delta(plan.patches[patch], name)) for patch, name in weight.deltas]
    landing = Landing()
    if deltas:
        landing.keys = key_shift([(plan.patches[patch], name) for patch, name in weight.deltas], deltas)
    before, after = hashlib.sha256(), hashlib.sha256()
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
        place = ref.begin + begin * row_bytes
        files.write_at(new, place, data)
        if files.read_at(new, place, len(data)) != data:
            raise Damaged(f"{printable(weight.name, 120)} was not read back as written; nothing was changed")
    if before.hexdigest() != weight.base:
        raise Damaged(
            f"The original bytes of {printable(weight.name, 120)} are not what they were when they were checked",
            hint="another program may be writing to the checkpoint; nothing was changed",
        )
    patches = tuple(patch for patch, _ in weight.deltas)
    written = after.hexdigest() if deltas else weight.base
    record = AppliedWeight(ref.dtype, ref.shape, weight.base, written, patches)
    return record, landing if deltas else None


def _overflow(weight: WeightPlan, error: Overflow) -> Refused:
    return Refused(
        f"{printable(weight.name, 120)} cannot hold the patch as {weight.ref.dtype}",
        details=[f"it would give {error}"],
        hint="apply to a float32 or bfloat16 copy of the checkpoint",
    )
