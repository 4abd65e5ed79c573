"""Does a patch fit a checkpoint? By the SHA-256 of each weight's bytes as they are without any patch.

Torch is imported only where a weight is stored in another dtype than the patch was made for, or is sketched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kpatch import parallel
from kpatch.checkpoint import files
from kpatch.checkpoint.base_weights import StoredWeights, Weights
from kpatch.checkpoint.checks import refuse_quantized
from kpatch.checkpoint.commit import unfinished
from kpatch.checkpoint.shards import Checkpoint, open_checkpoint
from kpatch.checkpoint.store import Store
from kpatch.errors import BadInput, Damaged, KpatchError, Refused
from kpatch.patch.fields import FLOAT_DTYPES
from kpatch.patch.header import PatchInfo, read_header
from kpatch.patch.manifest import BaseWeight
from kpatch.patch.matching import match
from kpatch.patch.sources import PatchSource
from kpatch.reporter import SILENT, Reporter
from kpatch.text import counted, printable


@dataclass(frozen=True)
class WeightFit:
    """One weight of a patch on a checkpoint.

    `stored` is its name there; `how` is "same bytes", "other dtype" (the same weights), or "misfit"; `found` the
    SHA-256 of the unpatched bytes; `detail` says what differs.
    """

    name: str
    stored: str | None
    how: str
    found: str | None
    detail: str = ""


@dataclass(frozen=True)
class Fit:
    """How a patch fits a checkpoint, weight by weight."""

    patch: PatchInfo
    model: str
    weights: tuple[WeightFit, ...]

    @property
    def ok(self) -> bool:
        return all(weight.how != "misfit" for weight in self.weights)

    @property
    def notes(self) -> tuple[str, ...]:
        """What should be said of a fit that is not exact."""
        other = [weight for weight in self.weights if weight.how == "other dtype"]
        return (f"{self.patch.name}: {other[0].detail} ({len(other)} weights)",) if other else ()

    def error(self, kind: type[KpatchError] = Refused) -> KpatchError:
        """The error for a patch that does not fit; `kind` Refused for apply, CheckFailed for a question."""
        worst = next(weight for weight in self.weights if weight.how == "misfit")
        missing = sum(weight.stored is None for weight in self.weights)
        reason = "is not the base it was made for"
        if worst.stored is None:
            others = f", nor {'is' if missing == 2 else 'are'} {counted(missing - 1, 'other weight')}"
            reason = f"is not there{others if missing > 1 else ''}"
        hint = f"`kpatch status {self.model}` lists what is applied; `kpatch show {self.patch.path}` names its base"
        if all(weight.found is not None for weight in self.weights):
            # every weight is there in its shape: the same architecture with other values, as after fine-tuning
            hint += f"; for a fine-tuned model make the patch anew: `kpatch make FACTS --model {self.model}`"
        return kind(
            f"{self.patch.path} does not fit {self.model}: {worst.name} {reason}",
            details=[worst.detail] if worst.detail else (),
            hint=hint,
        )


def verify_fit(patch: PatchSource, model_dir: str | Path, report: Reporter = SILENT) -> Fit:
    """Whether a patch was made for this checkpoint (as it is without patches). Nothing is written.

    Raises BadInput, Damaged or Refused when the patch or the checkpoint cannot be read.
    """
    info, checkpoint = read_header(patch), open_checkpoint(model_dir)
    store = settled_store(checkpoint)
    refuse_quantized(checkpoint)
    return fit(info, StoredWeights(checkpoint, store, store.applied()), report)


def settled_store(checkpoint: Checkpoint) -> Store:
    """The store of a checkpoint for one who only reads. Raises Damaged while an apply or revert is unfinished."""
    store = Store(checkpoint.path)
    store.check()
    if unfinished(store):
        raise Damaged(
            f"{checkpoint.given} holds an interrupted apply or revert", hint=f"run `kpatch recover {checkpoint.given}`"
        )
    return store


def fit(info: PatchInfo, weights: Weights, report: Reporter = SILENT) -> Fit:
    """Compare every weight a patch names with the checkpoint's unpatched bytes."""
    checkpoint = weights.checkpoint
    refs = [(name, checkpoint.find(name)) for name in sorted(info.manifest.base.weights)]
    amount = sum(checkpoint.tensors[stored].end - checkpoint.tensors[stored].begin for _, stored in refs if stored)
    with report.task(f"Checking the base of {info.name}", amount, "B") as advance:
        found = parallel.each(lambda ref, go_on: _fit_weight(info, *ref, weights, go_on), refs, advance)
    taken = [weight.stored for weight in found if weight.stored is not None]
    if len(set(taken)) != len(taken):
        raise BadInput(f"Two weights of {info.name} lead to the same tensor of {checkpoint.given}")
    return Fit(info, checkpoint.given, tuple(found))


def _fit_weight(info: PatchInfo, name: str, stored: str | None, weights: Weights, advance: files.Advance) -> WeightFit:
    expected = info.manifest.base.weights[name]
    checkpoint = weights.checkpoint
    trouble = checkpoint.why_not(name)
    if stored is None or trouble is not None:
        return WeightFit(name, stored, "misfit", None, trouble or "")
    ref = checkpoint.tensors[stored]
    hashed = cache(lambda: weights.hash(stored, advance))
    how = match(expected, ref.shape, ref.dtype, hashed, lambda: weights.tensor(stored))
    if how == "other shape":
        detail = f"expected shape {list(expected.shape)}   found {list(ref.shape)}"
        return WeightFit(name, stored, "misfit", None, detail)
    if how == "same bytes":
        return WeightFit(name, stored, how, hashed())
    if how == "other dtype":
        detail = f"the same weights as it was made for, but stored as {ref.dtype} instead of {expected.dtype}"
        return WeightFit(name, stored, how, hashed(), detail)
    if weights.after(stored) == expected.sha256:
        why = "made for this checkpoint with patches on it; use `kpatch make --on` for that"
    elif ref.dtype == expected.dtype:
        why = "same shape; other weights, not another dtype of the same"
    else:
        why = f"stored as {ref.dtype} instead of {expected.dtype}, and other weights"
    detail = f"expected sha256 {expected.sha256[:8]}…   found {hashed()[:8]}…  ({why})"
    return WeightFit(name, stored, "misfit", hashed(), detail)


def base_weights(model_dir: str | Path, names: Iterable[str], report: Reporter = SILENT) -> dict[str, BaseWeight]:
    """What a manifest says of the weights it is made for, from the checkpoint's bytes as they are without patches.

    For `make`, also with `on`, and `diff`. Raises BadInput for a weight that is not there or holds no float numbers,
    Refused for a quantized checkpoint.
    """
    from kpatch.patch.fingerprint import sketch

    checkpoint = open_checkpoint(model_dir)
    store = settled_store(checkpoint)
    refuse_quantized(checkpoint)
    weights = StoredWeights(checkpoint, store, store.applied())
    result = {}
    for name in sorted(names):
        stored = checkpoint.find(name)
        trouble = checkpoint.why_not(name)
        if stored is None or trouble is not None:
            raise BadInput(
                f"{checkpoint.given} has no tensor {printable(name, 120)} that can be patched",
                details=[trouble] if trouble else [],
            )
        ref = checkpoint.tensors[stored]
        if ref.dtype not in FLOAT_DTYPES or not ref.shape or 0 in ref.shape:
            raise BadInput(
                f"{stored} of {checkpoint.given} is {printable(ref.dtype, 20)} of shape {list(ref.shape)}",
                details=["expected a tensor of float numbers, at least one"],
            )
        sha256, sketched = weights.hash(stored), tuple(sketch(weights.tensor(stored)))
        result[name] = BaseWeight(ref.shape, ref.dtype, sha256, sketched)
    return result
