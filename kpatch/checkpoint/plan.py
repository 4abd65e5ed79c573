"""What an apply or a revert will do, worked out and checked in full before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kpatch.checkpoint.base_weights import HashedOnce, Stamp, Weights, require_intact, stamp
from kpatch.checkpoint.checks import (
    refuse_quantized,
    require_kept,
    require_no_child,
    require_own_files,
    require_parents,
)
from kpatch.checkpoint.fit import fit
from kpatch.checkpoint.records import Applied, AppliedPatch
from kpatch.checkpoint.replaced import replacing
from kpatch.checkpoint.shards import Checkpoint, TensorRef
from kpatch.checkpoint.store import Store
from kpatch.errors import BadInput, Refused
from kpatch.patch.check import verify
from kpatch.patch.combine import called, refuse_twice
from kpatch.patch.header import PatchInfo, read_header
from kpatch.patch.sources import PatchSource
from kpatch.reporter import SILENT, Reporter
from kpatch.text import counted, printable


@dataclass(frozen=True)
class WeightPlan:
    """One weight to be written: where it lies, its unpatched SHA-256, whether those bytes are kept already, and its
    deltas as (patch id, name in the patch) in the order of ids; none means the unpatched bytes come back."""

    name: str
    ref: TensorRef
    base: str
    kept: bool
    deltas: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Plan:
    """All that will be done: `moved` are the patches put on or taken off, `stack` is what is applied afterwards.

    `sums` are what was found for a warning and serves the writing too: see `kpatch.patch.size.size_of_sum`.
    """

    action: str
    checkpoint: Checkpoint
    before: Applied
    moved: tuple[AppliedPatch, ...]
    stack: tuple[AppliedPatch, ...]
    base: str | None
    weights: tuple[WeightPlan, ...]
    patches: Mapping[str, PatchInfo]
    stamps: Mapping[str, Stamp]
    notes: tuple[str, ...] = ()
    sums: dict[tuple[str, str], Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def replaced(self) -> dict[str, Mapping[str, tuple[int, ...]]]:
        """Facts that later patches stand for: positions by patch id, by the id of the later patch."""
        return {patch.id: patch.replaces for patch in self.stack if patch.replaces}

    @property
    def files(self) -> tuple[str, ...]:
        """Weight files to be replaced, sorted."""
        return tuple(sorted({weight.ref.file for weight in self.weights}))

    @property
    def sample(self) -> Path | None:
        """One of these; None where no weight changes."""
        return next((self.checkpoint.path / file for file in self.files), None)

    @property
    def new_patches(self) -> tuple[AppliedPatch, ...]:
        """Patches whose copies are still to be kept."""
        return tuple(patch for patch in self.stack if patch.id not in self.before.ids)

    @property
    def bytes_written(self) -> int:
        """Of the disk space wanted while it runs, what is surely new: weights, newly kept bytes, copies of patches."""
        sizes = [(weight.ref.end - weight.ref.begin) * (1 if weight.kept else 2) for weight in self.weights]
        return sum(sizes) + sum(self.patches[patch.id].bytes for patch in self.new_patches)

    @property
    def bytes_needed(self) -> int:
        """Disk space wanted while it runs, where the rest of the new weight files has to be copied too."""
        rest = sum(self.stamps[file].size for file in self.files)
        return self.bytes_written + rest - sum(weight.ref.end - weight.ref.begin for weight in self.weights)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of a plan, for `check`."""
        return {
            "action": self.action,
            "patches": [{"id": patch.id, "name": patch.name} for patch in self.moved],
            "files": list(self.files),
            "weights": [{"name": weight.name, "file": weight.ref.file} for weight in self.weights],
            "bytes_needed": self.bytes_needed,
            "notes": list(self.notes),
        }

    def require_current(self, store: Store) -> None:
        """Raise Refused when the checkpoint is no longer what was planned for. To be called under the lock."""
        same = all(stamp(self.checkpoint.path / file) == seen for file, seen in self.stamps.items())
        if not same or store.applied() != self.before or store.journal() is not None:
            raise Refused(f"{self.checkpoint.given} changed while it was being checked", hint="run the command again")


def plan_apply(
    given: Sequence[PatchSource],
    weights: Weights,
    store: Store,
    *,
    copy: bool,
    check: bool,
    force: bool,
    whole: bool = False,
    instead: bool = False,
    report: Reporter,
) -> Plan:
    """Check patches against a checkpoint and each other. `copy`: for `out`, where the checkpoint is not written to;
    `whole`: the weights of the patches applied before are planned too, not only those the new ones change; `instead`:
    facts of the new patches stand for earlier ones that they contradict.

    The tensors of the patches are checked here only for a `check`; else in the copies that are kept of them, before
    a weight is written. Raises BadInput, Refused or Damaged; nothing is written.
    """
    if not given:
        raise BadInput("No patch given")
    checkpoint, applied = weights.checkpoint, store.applied()
    new = [verify(patch, report) if check else read_header(patch) for patch in given]
    patches = {patch.id: store.patch(patch.id) for patch in applied.patches}
    named = [(patch.name, patches[patch.id]) for patch in applied.patches] + [(info.name, info) for info in new]
    refuse_twice(named, len(applied.patches), checkpoint.given)
    moved = tuple(AppliedPatch(info.id, info.name, len(info.manifest.facts), info.manifest.parents) for info in new)
    patches.update({info.id: info for info in new})
    moved = replacing(applied.patches, moved, patches, instead, report)
    refuse_quantized(checkpoint)
    require_intact(checkpoint, applied, report)
    require_parents(new, list(patches.values()), checkpoint)
    once = HashedOnce(weights)
    fits = [fit(info, once, report) for info in new]
    for one in fits:
        if not one.ok:
            raise one.error()
    base = applied.base if applied.patches else printable(new[0].manifest.base.name, 200)
    touched = {weight.stored: weight.found for one in fits for weight in one.weights if weight.stored and weight.found}
    others = {identity for patch in moved for identity in patch.replaces}
    touched = {
        **{name: one.base for name, one in applied.weights.items() if whole or others & set(one.patches)},
        **touched,
    }
    notes = tuple(note for one in fits for note in one.notes)
    stack = (*applied.patches, *moved)
    planned = _weights(checkpoint, applied, stack, touched, patches)
    checked = {weight.stored for one in fits for weight in one.weights}
    kept = [(weight.base, weight.ref) for weight in planned if weight.kept and weight.name not in checked]
    require_kept(store, kept, True, report)
    if not copy:
        require_own_files(checkpoint, (weight.ref.file for weight in planned), force)
    stamps = _stamps(checkpoint, planned)
    return Plan("apply", checkpoint, applied, moved, stack, base, planned, patches, stamps, notes)


def plan_revert(
    chosen: Sequence[str],
    checkpoint: Checkpoint,
    store: Store,
    *,
    force: bool = False,
    check: bool = False,
    report: Reporter = SILENT,
) -> Plan:
    """Check that patches, by id, can be taken off. Raises Refused or Damaged; nothing is written.

    The kept bytes are hashed here only for a `check`; else while they are written to the new files, none of which
    takes its place before all are found sound.
    """
    applied = store.applied()
    moved = tuple(patch for patch in applied.patches if patch.id in chosen)
    gone = {patch.id for patch in moved}
    stack = tuple(_forget(patch, gone) for patch in applied.patches if patch.id not in gone)
    require_no_child(moved, stack, store)
    require_intact(checkpoint, applied, report)
    # Only the patches that stay are read: one that goes can be taken off even when its copy is lost.
    patches = {patch.id: store.patch(patch.id) for patch in stack}
    changed = gone | {identity for patch in moved for identity in patch.replaces}
    touched = {name: weight.base for name, weight in applied.weights.items() if changed & set(weight.patches)}
    base = applied.base if stack else None
    weights = _weights(checkpoint, applied, stack, touched, patches)
    require_kept(store, ((weight.base, weight.ref) for weight in weights if weight.kept), check, report)
    require_own_files(checkpoint, (weight.ref.file for weight in weights), force)
    return Plan("revert", checkpoint, applied, moved, stack, base, weights, patches, _stamps(checkpoint, weights))


def _forget(patch: AppliedPatch, gone: set[str]) -> AppliedPatch:
    """The record of a patch without what it replaced in patches that go."""
    return replace(patch, replaces={one: facts for one, facts in patch.replaces.items() if one not in gone})


def warn_ahead(plan: Plan, report: Reporter) -> None:
    """Warn of what the patches of a plan do to one another and to the model."""
    _warn_of_interference(plan, report)
    _warn_of_size(plan, report)


def _warn_of_interference(plan: Plan, report: Reporter) -> None:
    """Warn where a patch that is put on moves the keys of another one, or the other way round, as `stack` does."""
    if len(plan.stack) < 2:
        return
    from kpatch.patch.interference import added_subjects, strong_pairs, warning

    numbers = {patch.id: number for number, patch in enumerate(plan.stack)}
    infos = [plan.patches[patch.id] for patch in plan.stack]
    weights = [{numbers[identity]: name for identity, name in weight.deltas} for weight in plan.weights]
    for by, on in strong_pairs(infos, weights, len(plan.moved)):
        report.warn(warning(*(called(infos[number], plan.stack[number].name) for number in (by, on))))
    for one, other, subjects in added_subjects(infos, weights, len(plan.moved)):
        names = [called(infos[number], plan.stack[number].name) for number in (one, other)]
        report.warn(
            f"{names[0]} and {names[1]} change other facts about {counted(subjects, 'subject')}: what they do there is"
            " added; `kpatch stack --resolve` finds one value for each subject"
        )


def _warn_of_size(plan: Plan, report: Reporter) -> None:
    """Warn where all that is applied then is as large as changes that break a model."""
    from kpatch.patch.size import FEWER, RESOLVE, parts_by_weight, size_of_sum, the_sum, warning

    infos = [plan.patches[identity] for identity in sorted(patch.id for patch in plan.stack)]  # as they are added up
    stored = {name: plan.checkpoint.find(name) or name for info in infos for name in info.manifest.deltas}
    found = size_of_sum(parts_by_weight(infos, names=stored), plan.replaced, keep=plan.sums)
    alone = len(infos) == 1
    large = warning(plan.stack[0].name if alone else the_sum(infos), found, FEWER if alone else RESOLVE)
    if large:
        report.warn(large)


def _weights(
    checkpoint: Checkpoint,
    applied: Applied,
    stack: Sequence[AppliedPatch],
    touched: Mapping[str, str],
    patches: Mapping[str, PatchInfo],
) -> tuple[WeightPlan, ...]:
    """One WeightPlan per weight of `touched` (stored name -> unpatched SHA-256), with the deltas of all the stack."""
    deltas: dict[str, list[tuple[str, str]]] = {}
    for identity in sorted(patch.id for patch in stack):
        for name in patches[identity].manifest.deltas:
            stored = checkpoint.find(name)
            if stored is not None and stored in touched:
                deltas.setdefault(stored, []).append((identity, name))
    return tuple(
        WeightPlan(name, checkpoint.tensors[name], sha256, name in applied.weights, tuple(deltas.get(name, ())))
        for name, sha256 in sorted(touched.items())
    )


def _stamps(checkpoint: Checkpoint, weights: Sequence[WeightPlan]) -> dict[str, Stamp]:
    return {weight.ref.file: stamp(checkpoint.path / weight.ref.file) for weight in weights}
