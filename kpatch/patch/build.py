"""The one place that puts a manifest together: `make`, `stack` and `diff` all call it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kpatch._version import __version__
from kpatch.patch.delta import Delta, LowRank
from kpatch.patch.manifest import FORMAT, WITH_HELD_ROWS, Base, BaseWeight, DeltaInfo, Manifest, stored_transposed

TOOL = f"kpatch {__version__}"


def build_manifest(
    *,
    base_name: str,
    family: str,
    weights: Mapping[str, BaseWeight],
    deltas: Mapping[str, Delta | DeltaInfo],
    method: str,
    layers: Sequence[int],
    revision: str | None = None,
    tokenizer: str | None = None,
    facts: Sequence[Mapping[str, Any]] = (),
    hyperparameters: Mapping[str, Any] | None = None,
    covariance: Mapping[str, Any] | None = None,
    groups: Sequence[Mapping[str, Any]] = (),
    protect: Sequence[Mapping[str, Any]] = (),
    stack: Sequence[Mapping[str, Any]] = (),
    parents: Sequence[str] = (),
    effect: Mapping[str, Any] | None = None,
    transposed: bool | None = None,
    base_extra: Mapping[str, Any] | None = None,
    by_row: Collection[str] = (),
) -> Manifest:
    """The manifest of a patch; `tensors` are filled in when it is written.

    `weights` and `deltas` are by the weight's name, `layers` in any order. A `Delta` is measured here, against the
    norm that the weight's sketch holds. `transposed` says whether all these weights are stored [in, out]; None where
    that is not known here, or where the weights say it themselves. `by_row` names the low-rank deltas that have a
    column and a row for each row of the layer's stored keys.
    """
    known = {name: _oriented(family, name, weight, transposed) for name, weight in weights.items()}
    return Manifest(
        base=Base(base_name, family, known, revision, tokenizer, base_extra or {}),
        method=method,
        layers=tuple(sorted(layers)),
        deltas={name: _info(delta, known[name], name in by_row) for name, delta in deltas.items()},
        facts=tuple(facts),
        groups=tuple(groups),
        hyperparameters=hyperparameters or {},
        covariance=covariance,
        parents=tuple(parents),
        effect=effect,
        protect=tuple(protect),
        stack=tuple(stack),
        tool=TOOL,
        format=FORMAT if all(group["facts"] for group in groups) else WITH_HELD_ROWS,
    )


def describe(delta: Delta, base_norm: float) -> DeltaInfo:
    """The manifest's entry for a delta; `base_norm` is the Frobenius norm of the weight it is for."""
    form = "lowrank" if isinstance(delta, LowRank) else "dense"
    norm = delta.norm()
    return DeltaInfo(form, delta.rank, norm, norm / base_norm if base_norm > 0 else 0.0)


def _info(delta: Delta | DeltaInfo, weight: BaseWeight, by_row: bool) -> DeltaInfo:
    if isinstance(delta, DeltaInfo):
        return delta
    return replace(describe(delta, float(weight.sketch[0]) if weight.sketch else 0.0), by_row=by_row)


def _oriented(family: str, name: str, weight: BaseWeight, transposed: bool | None) -> BaseWeight:
    """The weight with its orientation: `true` is always written, `false` only where a reader would assume `true`."""
    if transposed or (transposed is False and stored_transposed(family, name, weight)):
        return replace(weight, transposed=transposed)
    return weight
