"""Patches onto a checkpoint directory, or into a patched copy of it.

Nothing here needs torch before the first sum is taken, so taking all patches off never does.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpatch.checkpoint.base_weights import StoredWeights, Weights
from kpatch.checkpoint.checks import require_space
from kpatch.checkpoint.commit import begin, commit, system_errors, undisturbed, undo, unfinished, writing
from kpatch.checkpoint.patched_copy import COPY_DTYPES, place_for, write_copy
from kpatch.checkpoint.plan import Plan, plan_apply, warn_ahead
from kpatch.checkpoint.records import Applied, Journal, Staged
from kpatch.checkpoint.recover import settle
from kpatch.checkpoint.shards import has_adapter, only_pickled, open_checkpoint, other_weights, real_directory
from kpatch.checkpoint.stage import Outcome, keep_copies, stage_files
from kpatch.checkpoint.status import logged
from kpatch.checkpoint.store import Store
from kpatch.errors import BadInput, Damaged
from kpatch.patch.sources import PatchSource, patch_list
from kpatch.reporter import SILENT, Reporter
from kpatch.text import printable

if TYPE_CHECKING:
    from kpatch.checkpoint.rounding import RoundingStats

# Above this share of the intended delta lost in rounding, a user is warned.
LOSS = 0.05


@dataclass(frozen=True)
class WeightReport:
    """What rounding did to one weight's delta; None where there is none (all patches reverted, or only checked).

    `unchanged`: share of the entries with a nonzero delta that stayed as they were; `delta_error`: relative Frobenius
    error of the delta that landed; `key_error`: that error of Δk, over the keys the patches were made for (None too
    when they carry none). All of the whole stack's delta, against the unpatched weight.
    """

    name: str
    unchanged: float | None
    delta_error: float | None
    key_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        own = {"name": self.name, "unchanged": self.unchanged}
        return {**own, "delta_error": self.delta_error, "key_error": self.key_error}


@dataclass(frozen=True)
class ApplyReport:
    """The outcome of an apply or revert: `model` is the directory written to, `plan` what was or would be done."""

    model: str
    patches: tuple[dict[str, str], ...]
    weights: tuple[WeightReport, ...]
    seconds: float
    state: str
    plan: Plan
    notes: tuple[str, ...] = ()
    checked_only: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `apply` and `revert`; with `check` the plan as well."""
        value = {
            "model": self.model,
            "patches": list(self.patches),
            "weights": [weight.to_dict() for weight in self.weights],
            "seconds": self.seconds,
            "state": self.state,
            "notes": list(self.notes),
        }
        return {**value, "plan": self.plan.to_dict()} if self.checked_only else value


def apply(
    patches: PatchSource | Iterable[PatchSource],
    model_dir: str | Path,
    *,
    check: bool = False,
    out: str | Path | None = None,
    dtype: str | None = None,
    replace: bool = False,
    force: bool = False,
    report: Reporter = SILENT,
) -> ApplyReport:
    """Apply one patch or several to a checkpoint directory: weights become round(base + Σ Δ_i), all or none.

    Patches that store what they were solved from add what solving them together gives, in whatever order they came.

    `patches` are files, or what was read from them; one alone counts as a list of one.
    `check` stops after the plan and writes nothing. `out` leaves the checkpoint alone and writes a patched copy to a
    new directory, optionally in another `dtype` (float32, bfloat16 or float16), and as safetensors where the
    checkpoint is a PyTorch one. With `replace`, a fact that contradicts one of an earlier patch takes its place: the
    earlier one is left out of the sum until the later patch is reverted. `force` replaces write-protected weight
    files. Ctrl-C and errors before the renames leave the old bytes. The patches are copied first, checked once in
    these copies, and read from them.

    Raises BadInput, Refused (wrong base, conflict, applied already, links, locked), Damaged (a patch or checkpoint
    that is not sound), KpatchError (disk full, no permission).
    """
    start, given = time.monotonic(), patch_list(patches)
    _check_dtype(dtype, out)
    store = ready(model_dir, write=not check and out is None, report=report)
    if out is not None:
        place_for(Path(out), store.model)  # before the hashing, which can take a while
    with undisturbed(store), system_errors(store.model):
        weights = _open(model_dir, store, pickled=out is not None)
        checkpoint = weights.checkpoint
        whole = dtype is not None or not isinstance(weights, StoredWeights)
        plan = plan_apply(
            given,
            weights,
            store,
            copy=out is not None,
            check=check,
            force=force,
            whole=whole,
            instead=replace,
            report=report,
        )
    for note in plan.notes:
        report.note(note)
    for other in other_weights(checkpoint):
        report.warn(f"{other} holds weights too and stays as it is; a loader that prefers it knows nothing of patches")
    if checkpoint.ambiguous:
        report.warn(
            f"{len(checkpoint.ambiguous)} tensors of {checkpoint.given} stand in two files, and loaders do not agree"
            " on which counts"
        )
    if has_adapter(checkpoint.path):
        report.note(
            f"{checkpoint.given} holds a LoRA adapter too (adapter_config.json), which transformers puts on top of the"
            " weights; the patch changes the weights alone"
        )
    if check:
        warn_ahead(plan, report)
        return report_of(plan, {}, start, checkpoint.given, checked_only=True)
    if out is not None:
        stored = COPY_DTYPES[dtype] if dtype is not None else None
        written, outcomes = write_copy(plan, weights, store, Path(out), whole, stored, report)
    else:
        written, outcomes = checkpoint.given, carry_out(plan, store, report)
    _warn(outcomes, report)
    return report_of(plan, outcomes, start, written)


def _check_dtype(dtype: str | None, out: str | Path | None) -> None:
    if dtype is None:
        return
    if dtype not in COPY_DTYPES:
        raise BadInput(
            f"There is no dtype {printable(dtype, 40)} for a copy", details=[f"expected {', '.join(COPY_DTYPES)}"]
        )
    if out is None:
        raise BadInput("A checkpoint keeps its dtype; only a copy can have another", hint="give `out` with `dtype`")


def _open(model_dir: str | Path, store: Store, *, pickled: bool) -> Weights:
    if pickled and only_pickled(store.model):
        from kpatch.checkpoint.pickled import open_pickled

        return open_pickled(model_dir)
    return StoredWeights(open_checkpoint(model_dir), store, store.applied())


def ready(model_dir: str | Path, *, write: bool, report: Reporter) -> Store:
    """The store of a directory with no interrupted run in it: one that is there is ended first.

    Raises Damaged for an interrupted checkpoint when nothing may be written.
    """
    path, given = real_directory(model_dir)
    store = Store(path)
    store.check()
    if unfinished(store):
        if not write:
            raise Damaged(f"{given} holds an interrupted apply or revert", hint=f"run `kpatch recover {given}`")
        with writing(store), system_errors(path):
            settle(store, given, report)
    return store


def carry_out(plan: Plan, store: Store, report: Reporter) -> dict[str, Outcome]:
    """Run a plan in place. Until the commit an error or Ctrl-C leaves the old bytes and cleans up."""
    with writing(store), system_errors(store.model):
        plan.require_current(store)
        try:
            begin(store)
            require_space(store.stage, plan.bytes_needed, plan.bytes_written, plan.sample)
            plan = keep_copies(plan, store, plan.new_patches, report)
            if plan.new_patches:
                warn_ahead(plan, report)
            targets = {file: store.staged(file) for file in plan.files}
            outcomes = stage_files(plan, store, targets, report)
            applied = after(plan, outcomes)
            store.write_readme()
            journal = Journal(plan.action, tuple(patch.id for patch in plan.moved), staged(plan, outcomes), applied)
            plan.require_current(store)
            commit(store, journal, report)
        except BaseException:
            _undo_quietly(store)
            raise
    return outcomes


def _undo_quietly(store: Store) -> None:
    # What went wrong first is what the user must hear; leftovers are found by the next command.
    try:
        undo(store)
    except Exception:
        return


def after(plan: Plan, outcomes: dict[str, Outcome]) -> Applied:
    """The record of a checkpoint once the plan is carried out; weights without a delta left are forgotten."""
    weights = dict(plan.before.weights)
    for weight in plan.weights:
        if weight.deltas:
            weights[weight.name] = outcomes[weight.name][0]
        else:
            weights.pop(weight.name, None)
    return Applied(plan.base, plan.stack, weights, logged(plan.before, plan.action, plan.moved))


def staged(plan: Plan, outcomes: dict[str, Outcome]) -> dict[str, Staged]:
    """What the journal says of each new file."""
    return {
        file: Staged(
            plan.stamps[file].size,
            {weight.name: outcomes[weight.name][0].after for weight in plan.weights if weight.ref.file == file},
        )
        for file in plan.files
    }


def _warn(outcomes: dict[str, Outcome], report: Reporter) -> None:
    """Say it when rounding lost more of the edit than a user would expect, and what keeps all of it."""
    lost = {name: _loss(stats) for name, (_, stats) in outcomes.items() if stats is not None}
    worst = max(lost, key=lambda name: lost[name], default=None)
    if worst is None or lost[worst] <= LOSS:
        return
    record, stats = outcomes[worst]
    assert stats is not None
    shares = f"{stats.delta_error:.0%} of the change to {printable(worst, 120)}"
    if stats.key_error is not None:
        shares += f", and {stats.key_error:.0%} of what it does at the facts' own keys"
    report.warn(
        f"Rounding to {record.dtype} lost {shares}; a float32 copy (`kpatch apply … -o NEW_DIR --dtype float32`)"
        " or a LoRA adapter beside the model (`kpatch export … --to peft`) keeps all of it"
    )


def _loss(stats: RoundingStats) -> float:
    return max(stats.delta_error, stats.key_error or 0.0)


def report_of(
    plan: Plan, outcomes: dict[str, Outcome], start: float, model: str, checked_only: bool = False
) -> ApplyReport:
    """The report of a plan that was carried out, or only checked, since `start` (time.monotonic())."""
    weights = []
    for weight in plan.weights:
        stats = outcomes[weight.name][1] if weight.name in outcomes else None
        figures = (stats.unchanged, stats.delta_error, stats.key_error) if stats is not None else (None, None, None)
        weights.append(WeightReport(weight.name, *figures))
    patches = tuple({"id": patch.id, "name": patch.name} for patch in plan.moved)
    seconds = time.monotonic() - start
    return ApplyReport(model, patches, tuple(weights), seconds, "clean", plan, plan.notes, checked_only)
