"""Two patches beside each other: facts, settings, the size and direction of their deltas, what they do to each other.

Norms, angles and differences come from the factors (through Gram matrices and QR); no delta is formed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, linalg

from kpatch.errors import Refused
from kpatch.facts.conflicts import normal
from kpatch.patch.combine import common_base, place, read_together, text_of
from kpatch.patch.delta import Delta, LowRank, inner, total
from kpatch.patch.format import read_delta
from kpatch.patch.header import PatchInfo
from kpatch.patch.interference import Interference, interference, stored_keys
from kpatch.patch.sources import PatchSource
from kpatch.reporter import SILENT, Reporter


@dataclass(frozen=True)
class FactsDiff:
    """Facts of the second patch only, of the first only, pairs with another target, and how many are the same."""

    added: tuple[Mapping[str, Any], ...]
    removed: tuple[Mapping[str, Any], ...]
    changed: tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...]
    same: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "added": [_fact(fact) for fact in self.added],
            "removed": [_fact(fact) for fact in self.removed],
            "changed": [
                {"id": new.get("id"), "text": text_of(new), "before": old["target"], "after": new["target"]}
                for old, new in self.changed
            ],
            "same": self.same,
        }


@dataclass(frozen=True)
class WeightDiff:
    """The two deltas of one weight, None where a patch has none.

    norms  Frobenius; ranks None for a dense delta
    cosine, angle  ⟨Δ_a, Δ_b⟩ / (‖Δ_a‖ ‖Δ_b‖), and that as degrees from 0 to 180
    difference  ‖Δ_b − Δ_a‖ / max(‖Δ_a‖, ‖Δ_b‖)
    """

    name: str
    norms: tuple[float | None, float | None]
    ranks: tuple[int | None, int | None]
    cosine: float | None
    angle: float | None
    difference: float | None


@dataclass(frozen=True)
class PatchDiff:
    """All that `diff` tells of two patches. `base` says why they are not for one model, None when they are."""

    patches: tuple[PatchInfo, PatchInfo]
    base: str | None
    facts: FactsDiff
    settings: tuple[tuple[str, Any, Any], ...]
    weights: tuple[WeightDiff, ...]
    interference: tuple[Interference, ...]

    @property
    def equal(self) -> bool:
        """Whether it is one patch twice."""
        return self.patches[0].id == self.patches[1].id

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `diff` for two patches."""
        ids = [info.id for info in self.patches]
        return {
            "equal": self.equal,
            "patches": [
                {"id": info.id, "name": info.name, "facts": len(info.manifest.facts)} for info in self.patches
            ],
            "base": {"same": self.base is None, "detail": self.base},
            "facts": self.facts.to_dict(),
            "settings": [{"key": key, "before": old, "after": new} for key, old, new in self.settings],
            "weights": [asdict(weight) for weight in self.weights],
            "interference": [one.to_dict(ids) for one in self.interference],
        }


def diff_patches(a: PatchSource, b: PatchSource, report: Reporter = SILENT) -> PatchDiff:
    """Compare two patch files, the first as the older one.

    Raises BadInput, Damaged or Refused where one cannot be read.
    """
    older, newer = read_together((a, b))
    infos = (older, newer)
    different = None
    try:
        common_base(infos)
    except Refused as error:
        different = "; ".join(error.details)
    names = sorted({name for info in infos for name in info.manifest.deltas})
    weights: list[WeightDiff] = []
    found: list[Interference] = []
    with report.task("Comparing deltas", len(names), "weight") as advance:
        for name in names:
            deltas = {i: read_delta(info, name) for i, info in enumerate(infos) if name in info.manifest.deltas}
            shapes = {delta.shape for delta in deltas.values()}
            weights.append(_weight(name, deltas.get(0), deltas.get(1), len(shapes) == 1))
            if len(shapes) == 1:
                found += interference(infos, name, deltas, _keys(infos, name, deltas))
            advance(1)
    found.sort(key=lambda one: (one.by, one.on, one.layer, one.weight))
    settings = tuple(_settings(infos[0], infos[1]))
    return PatchDiff(infos, different, diff_facts(*infos), settings, tuple(weights), tuple(found))


def diff_facts(a: PatchInfo, b: PatchInfo) -> FactsDiff:
    """Facts by subject and prompt; a fact whose target differs is changed."""
    old, new = ({place(fact): fact for fact in info.manifest.facts} for info in (a, b))
    both = [(old[key], fact) for key, fact in new.items() if key in old]
    changed = tuple(pair for pair in both if normal(pair[0]["target"]) != normal(pair[1]["target"]))
    return FactsDiff(
        tuple(fact for key, fact in new.items() if key not in old),
        tuple(fact for key, fact in old.items() if key not in new),
        changed,
        len(both) - len(changed),
    )


def _fact(fact: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": fact.get("id"), "text": text_of(fact), "target": fact["target"]}


def _keys(infos: Sequence[PatchInfo], name: str, deltas: Mapping[int, Delta]) -> dict[int, Tensor]:
    found = {number: stored_keys(infos[number], name) for number in deltas}
    # Keys of different models may not even be of one length
    wide = {k.shape[0] for k in found.values() if k is not None}
    return {number: k for number, k in found.items() if k is not None} if len(wide) == 1 else {}


def _weight(name: str, a: Delta | None, b: Delta | None, comparable: bool) -> WeightDiff:
    norms = (None if a is None else a.norm(), None if b is None else b.norm())
    ranks = tuple(delta.rank if isinstance(delta, LowRank) else None for delta in (a, b))
    cosine = angle = difference = None
    if a is not None and b is not None and comparable:
        product, largest = a.norm() * b.norm(), max(a.norm(), b.norm())
        if product:
            cosine = max(-1.0, min(1.0, inner(a, b) / product))
            angle = math.degrees(math.acos(cosine))
        difference = _norm(total([b, _negative(a)])) / largest if largest else 0.0
    return WeightDiff(name, norms, (ranks[0], ranks[1]), cosine, angle, difference)


def _negative(delta: Delta) -> Delta:
    return delta.scaled(-1.0)


def _norm(delta: Delta) -> float:
    """‖Δ‖ by QR, which keeps its digits where two deltas nearly cancel and Gram matrices lose them."""
    return float(linalg.vector_norm(delta.svd()[1])) if isinstance(delta, LowRank) else delta.norm()


def _settings(a: PatchInfo, b: PatchInfo) -> list[tuple[str, Any, Any]]:
    """What differs in how the patches were made: (key, in the first, in the second)."""
    old, new = ({**_about(info), **info.manifest.hyperparameters} for info in (a, b))
    keys = [*old, *(key for key in new if key not in old)]
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _about(info: PatchInfo) -> dict[str, Any]:
    manifest = info.manifest
    return {
        "base": manifest.base.name,
        "revision": manifest.base.revision,
        "method": manifest.method,
        "layers": list(manifest.layers),
        "corpus": manifest.covariance and manifest.covariance["corpus"],
        "tokens": manifest.covariance and manifest.covariance["tokens"],
        "parents": list(manifest.parents),
        "stack": [part["id"] for part in manifest.stack],
    }
