"""A new weight file from an old one: all bytes copied, the patched weights' ranges written anew.

Header, metadata and every other tensor stay what they are by construction; the old file is only read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from kpatch import parallel
from kpatch.checkpoint import files
from kpatch.checkpoint.base_weights import base_damaged, read_base
from kpatch.checkpoint.plan import Plan, WeightPlan
from kpatch.checkpoint.records import AppliedPatch, AppliedWeight
from kpatch.checkpoint.store import Store
from kpatch.errors import Damaged, KpatchError, Refused
from kpatch.patch.check import check_data
from kpatch.patch.header import read_copy
from kpatch.reporter import Reporter
from kpatch.text import printable

if TYPE_CHECKING:
    from kpatch.checkpoint.rounding import Patched, RoundingStats

Outcome = tuple[AppliedWeight, "RoundingStats | None"]

# Bytes copied before the disk is asked to take them.
_STEP = 1 << 24
# Bytes of a weight that are brought back at a time.
_COPIED = 1 << 20
# Files of kept bytes that may be open at a time until they are synced.
_OPEN = 64


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
        unnamed: list[tuple[FileIO, Path]] = []
        alone = _alone(stack)

        def write(group: Sequence[tuple[_Pair, WeightPlan]], advance: files.Advance) -> None:
            path = store.base(group[0][1].base)
            if any(weight.deltas for _, weight in group):
                alone()
            with ExitStack() as own:
                if any(weight.kept for _, weight in group):
                    kept = own.enter_context(files.open_read(path))
                else:
                    kept = own.enter_context(_copy_original(path, *group[0]))
                for pair, weight in group:
                    outcomes[weight.name] = write_weight(plan, store, kept, pair.new, weight, advance)
                if any(weight.kept for _, weight in group):
                    return
                files.begin_sync(kept, 0, os.fstat(kept.fileno()).st_size)
                if len(unnamed) < _OPEN:  # a sync waits for other files too, so there is one of each at the end
                    unnamed.append((kept, path))
                    stack.push(own.pop_all())
                else:
                    _name(kept, path)

        # The bytes between the weights are copied, which is the system's work, while torch is loaded and the weights
        # are computed.
        tasks = [partial(_copy_rest, rest), *(partial(write, group) for group in groups.values())]
        parallel.in_parallel(tasks, advance, min(1 + parallel.MOST, parallel.processors()))
        for kept, path in unnamed:
            _name(kept, path)
        for pair in pairs:
            if os.fstat(pair.new.fileno()).st_size != pair.status.st_size:
                raise Damaged(f"The new {pair.source.name} has another size than the old one; it was thrown away")
            files.keep_attributes(pair.new, pair.status, owner=keep_owner)
            files.fsync(pair.new)
    return outcomes


def _alone(stack: ExitStack) -> Callable[[], None]:
    """What each of several threads calls before its first sum, so that torch takes one thread for it.

    Several weights are computed at a time, and the number of threads shows in a product's last bits. It ends with
    `stack`, when all of them have.
    """
    lock, begun = Lock(), list[bool]()

    def begin() -> None:
        from kpatch.patch.delta import one_thread

        with lock:
            if not begun:
                stack.enter_context(one_thread())
                begun.append(True)

    return begin


def keep_copies(plan: Plan, store: Store, wanted: Sequence[AppliedPatch], report: Reporter) -> Plan:
    """Copy patches of a plan into a store and check the copies; the plan reads its deltas from them from here on.

    Nobody else writes to a copy, so what was checked is what is applied, whatever becomes of the user's file. Raises
    Damaged for a patch that is not sound or no longer the one that was planned with.
    """
    patches = dict(plan.patches)
    for patch in wanted:
        source, copy = patches[patch.id].path, store.copy(patch.id)
        files.copy_file(source, copy, keep_mode=False)
        changed = Damaged(f"{source} changed while it was being read", hint="run the command again")
        try:
            info = read_copy(copy, patches[patch.id])
        except KpatchError:
            raise changed from None
        if info.id != patch.id:
            raise changed
        patches[patch.id] = check_data(info, source, report)
    return replace(plan, patches=patches)


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


def _copy_rest(pairs: Sequence[_Pair], advance: files.Advance) -> None:
    """Bring over everything but the ranges that are written anew."""
    for pair in pairs:
        position = 0
        for begin, end in [*((weight.ref.begin, weight.ref.end) for weight in pair.weights), (None, None)]:
            until = pair.status.st_size if begin is None else begin
            while position < until:
                step = min(until, position + _STEP)
                files.copy_range(pair.old, pair.new, position, step, advance)
                files.begin_sync(pair.new, position, step)
                position = step
            position = position if end is None else end


def _copy_original(path: Path, pair: _Pair, weight: WeightPlan) -> FileIO:
    """A copy of a weight's original bytes, to be kept at `path` and so far without a name, for reading back."""
    files.unlink(_unnamed(path))
    kept = files.create(_unnamed(path), pair.status.st_mode & 0o666)
    with ExitStack() as own:
        own.enter_context(kept)
        files.copy_range(pair.old, kept, weight.ref.begin, weight.ref.end, to=0)
        own.pop_all()
    return kept


def _name(kept: FileIO, path: Path) -> None:
    """Sync and close kept bytes, which were read back and are what they should be: they get the name of their hash."""
    files.fsync(kept)
    kept.close()
    files.replace(_unnamed(path), path)


def _unnamed(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def write_weight(
    plan: Plan, store: Store, kept: FileIO, new: FileIO, weight: WeightPlan, advance: files.Advance = files.nothing
) -> Outcome:
    """Write one weight, its kept original bytes plus its deltas, to its place in a new file; every block is read back.

    Raises Refused when it does not fit its dtype, Damaged when the kept bytes or a patch are not sound.
    """
    ref = weight.ref
    change = _change(plan, weight)
    before, after = hashlib.sha256(), hashlib.sha256()
    for begin, end in _blocks(ref.end - ref.begin) if change is None else change.blocks():
        block = files.read_at(kept, begin, end - begin)
        before.update(block)
        data = memoryview(block)
        if change is not None:
            data = _patched(change, block, begin, store, weight)
            after.update(data)
        place = ref.begin + begin
        files.write_at(new, place, data)
        if files.read_at(new, place, len(data)) != data:
            raise Damaged(f"{printable(weight.name, 120)} was not read back as written; nothing was changed")
        advance(len(data))
    files.begin_sync(new, ref.begin, ref.end)
    if before.hexdigest() != weight.base:
        if weight.kept:
            raise base_damaged(store, weight.base)
        raise Damaged(
            f"The original bytes of {printable(weight.name, 120)} are not what they were when they were checked",
            hint="another program may be writing to the checkpoint; nothing was changed",
        )
    patches = tuple(patch for patch, _ in weight.deltas)
    if change is None:
        return AppliedWeight(ref.dtype, ref.shape, weight.base, weight.base, patches, False), None
    record = AppliedWeight(ref.dtype, ref.shape, weight.base, after.hexdigest(), patches, change.joint)
    return record, change.stats


def _change(plan: Plan, weight: WeightPlan) -> Patched | None:
    """What the patches change in a weight; None where they leave it as it was, which takes no torch."""
    if not weight.deltas:
        return None
    from kpatch.checkpoint.rounding import Patched

    patches = [(plan.patches[patch], name) for patch, name in weight.deltas]
    added = plan.sums.get(weight.deltas[0])
    whole = added is not None and len(added) == len(patches)  # a patch without facts has no size
    return Patched(patches, weight.ref, plan.replaced, added if whole else None)


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, length, _COPIED):
        yield begin, min(length, begin + _COPIED)


def _patched(change: Patched, block: bytearray, begin: int, store: Store, weight: WeightPlan) -> memoryview:
    from kpatch.checkpoint.rounding import Overflow

    try:
        return change.patch(block, begin)
    except Overflow as error:
        if weight.kept:
            read_base(store, weight.base)  # that may be why
        raise _overflow(weight, error) from None


def _overflow(weight: WeightPlan, error: ValueError) -> Refused:
    return Refused(
        f"{printable(weight.name, 120)} cannot hold the patch as {weight.ref.dtype}",
        details=[f"it would give {error}"],
        hint="apply to a float32 or bfloat16 copy of the checkpoint",
    )
