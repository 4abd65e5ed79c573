"""Several patches as one: Δ = Σ s_i Δ_i per weight, with as few columns as float32 can tell from the sum."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kpatch.errors import BadInput
from kpatch.patch.build import build_manifest
from kpatch.patch.combine import (
    FactUnion,
    Repeated,
    called,
    common_base,
    gather,
    outer_parents,
    parts_of,
    protected_by,
    read_together,
    refuse_twice,
    text_of,
    unite,
)
from kpatch.patch.delta import Delta, Dense, LowRank, smaller, total
from kpatch.patch.format import pack, write_patch
from kpatch.patch.header import PatchInfo
from kpatch.patch.interference import Interference, interference, solved_together, stored_keys
from kpatch.patch.joint import Joint
from kpatch.patch.size import RESOLVE, parts_by_weight, size_of_sum, the_sum, warning
from kpatch.patch.sources import PatchSource, patch_list
from kpatch.patch.summands import Part, asked, solvable, summands
from kpatch.reporter import SILENT, Reporter
from kpatch.text import printable


@dataclass(frozen=True)
class StackResult:
    """The outcome of `stack`; `id`, `path` and `bytes` are None when nothing was written.

    `weights` are {name, ranks (of each patch that changes it, None for a dense delta without), rank, form}; of the
    result only when it was written. `together` are the positions of the patches that are solved together, on every
    weight that they change: what they do to each other's keys is taken into account.
    """

    patches: tuple[PatchInfo, ...]
    scales: tuple[float, ...]
    union: FactUnion
    interference: tuple[Interference, ...]
    weights: tuple[dict[str, Any], ...]
    seconds: float
    together: frozenset[int] = frozenset()
    id: str | None = None
    path: Path | None = None
    bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `stack`."""
        ids = [info.id for info in self.patches]
        return {
            "patch": None if self.path is None else {"id": self.id, "path": str(self.path), "bytes": self.bytes},
            **about_patches(self.patches, self.scales, self.union, self.interference),
            "weights": list(self.weights),
            "seconds": self.seconds,
            "parents": list(outer_parents(self.patches)),
            "solved_together": [ids[number] for number in sorted(self.together)],
            "repeated": [
                {"fact": fact.text, "target": fact.target, "patches": [ids[index] for index in fact.patches]}
                for fact in self.union.repeated
            ],
        }


def about_patches(
    patches: Sequence[PatchInfo], scales: Sequence[float], union: FactUnion, found: Sequence[Interference]
) -> dict[str, Any]:
    """The keys that every form of `stack` has in its JSON object."""
    ids = [info.id for info in patches]
    return {
        "patches": [
            {"id": info.id, "name": info.name, "scale": scale, "facts": len(info.manifest.facts)}
            for info, scale in zip(patches, scales, strict=True)
        ],
        "facts": [{"id": fact.get("id"), "text": text_of(fact), "target": fact["target"]} for fact in union.facts],
        "interference": [one.to_dict(ids) for one in found],
    }


def stack(
    patches: PatchSource | Iterable[PatchSource],
    out: str | Path | None = None,
    *,
    scales: Sequence[float] | None = None,
    force: bool = False,
    report: Reporter = SILENT,
) -> StackResult:
    """Add patches up into one that does what applying each would do, and write it to `out` (None: only look).

    `scales` are factors above 0 on the patches' deltas, one each. Sums are taken in float64 and stored in float32:
    factors side by side, or fewer where the sum has a lower rank, or dense where that is smaller. Facts, values, keys
    and groups are those of all patches; the result's parents are those of the patches that are not stacked too.

    Raises BadInput for scales, Refused for facts that contradict, different bases, a patch given twice or `out`
    that exists, Damaged for a patch that is not sound.
    """
    start = time.monotonic()
    infos = read_together(patch_list(patches))
    if not infos:
        raise BadInput("No patch given")
    factors = _scales(scales, infos)
    refuse_twice([(info.name, info) for info in infos])
    union = unite(infos)
    base = common_base(infos, report)
    apart = _apart(infos)
    together = _together(infos, base.weights, apart)
    _warn(infos, factors, union, together, report)
    _warn_of_size(infos, factors, apart, report)
    deltas: dict[str, Delta] = {}
    by_row: set[str] = set()
    weights: list[dict[str, Any]] = []
    found: list[Interference] = []
    with report.task("Adding up", len(base.weights), "weight") as advance:
        for name in base.weights:
            own = {
                number: Part(info, name, factors[number])
                for number, info in enumerate(infos)
                if name in info.manifest.deltas
            }
            parts = {number: part.delta() for number, part in own.items()}
            keys = {number: k for number in parts if (k := stored_keys(infos[number], name)) is not None}
            found += interference(infos, name, parts, keys)
            weights.append({"name": name, "ranks": [part.rank for part in parts.values()]})
            if out is not None:
                deltas[name], whole = _sum(own, parts, apart)
                if whole:
                    by_row.add(name)
                form = "lowrank" if isinstance(deltas[name], LowRank) else "dense"
                weights[-1] |= {"rank": deltas[name].rank, "form": form}
            advance(1)
    found.sort(key=lambda one: (one.by, one.on, one.layer, one.weight))
    result = (infos, factors, union, tuple(found), tuple(weights))
    if out is None:
        return StackResult(*result, time.monotonic() - start, together)
    groups, values, stored = gather(infos, union, report)
    by_row = {name for name in by_row if _has_rows(deltas[name], stored.get(_layer(infos, name), None))}
    covariances = [info.manifest.covariance for info in infos]
    manifest = build_manifest(
        base_name=base.name,
        family=base.family,
        revision=base.revision,
        tokenizer=base.tokenizer,
        base_extra=base.extra,
        weights=base.weights,
        deltas=deltas,
        by_row=by_row,
        method="stack",
        layers=tuple({layer for info in infos for layer in info.manifest.layers}),
        facts=union.facts,
        groups=groups,
        protect=protected_by(infos),
        covariance=covariances[0] if all(one == covariances[0] for one in covariances) else None,
        parents=outer_parents(infos),
        stack=parts_of(infos, factors),
    )
    identity = write_patch(out, manifest, pack(deltas, values, stored), force)
    return StackResult(*result, time.monotonic() - start, together, identity, Path(out), Path(out).stat().st_size)


def add_up(deltas: Sequence[Delta]) -> Delta:
    """The sum in the smallest form that float32 cannot tell from it.

    Factors are put side by side, which is exact, unless the sum has a lower rank; dense where that is smaller.
    """
    whole = total(deltas)
    if isinstance(whole, Dense):
        ranks = [delta.rank for delta in deltas]
        known = None if None in ranks else min(sum(rank or 0 for rank in ranks), *whole.shape)
        return Dense(whole.dense(torch.float32), known)
    less = whole.compact() if len(deltas) > 1 else whole
    return smaller(less if less.rank < whole.rank else whole)


def _apart(infos: Sequence[PatchInfo]) -> set[int]:
    """Positions of the patches that are added as they are because one they were made on is not among them.

    What they ask for is counted from there. Where all were made on the same ones, they can be solved together.
    """
    inside = {part for info in infos for part in (info.id, *info.manifest.holds(info.id))}
    outer = [frozenset(info.manifest.parents) - inside for info in infos]
    return set() if len(set(outer)) == 1 else {number for number, missing in enumerate(outer) if missing}


def _together(infos: Sequence[PatchInfo], weights: Iterable[str], apart: Collection[int]) -> frozenset[int]:
    """Positions of the patches that are solved together on every weight that they change; none where one is alone."""
    left = set(range(len(infos))) - set(apart)
    for name in weights:
        names = {number: name for number in range(len(infos)) if name in infos[number].manifest.deltas}
        left -= names.keys() - solved_together(infos, {n: name for n in names if n not in apart})
    return frozenset(left) if len(left) > 1 else frozenset()


def _sum(own: Mapping[int, Part], deltas: Mapping[int, Delta], apart: Collection[int]) -> tuple[Delta, bool]:
    """The sum on one weight, and whether it is what one patch of all rows would store, rows in the given order."""
    together = [part for number, part in own.items() if number not in apart]
    whole = len(together) == len(own) == len(solvable(together))
    if len(own) == 1:
        (delta,) = deltas.values()
        return (delta, True) if whole else (add_up([delta]), False)
    if whole and sum(delta.rank or 0 for delta in deltas.values()) <= min(next(iter(deltas.values())).shape):
        joint = Joint([asked(part, deltas[number]) for number, part in own.items()])
        left, right = joint.as_one()
        order = _order([part.patch.id for part in together], joint)
        found = LowRank(left[:, order], right[order])
        return (found.transposed() if together[0].manifest.transposed(together[0].weight) else found), True
    rest = [deltas[number] for number in own if number in apart]
    return add_up([*summands(together), *rest]), False


def _order(ids: Sequence[str], joint: Joint) -> Tensor:
    """Where each row of the patches, in the order of `ids`, stands in the joint solution."""
    begin, start = 0, {}
    for one in joint.patches:
        start[one.id] = range(begin, begin + len(one.rows))
        begin += len(one.rows)
    return torch.tensor([row for identity in ids for row in start[identity]])


def _layer(infos: Sequence[PatchInfo], weight: str) -> int:
    found = next(info.manifest.layer_of(weight) for info in infos if weight in info.manifest.deltas)
    return -1 if found is None else found


def _has_rows(delta: Delta, keys: Tensor | None) -> bool:
    """Whether the gathered keys have a row for each rank: a patch without values contributes none."""
    return keys is not None and len(keys) == delta.rank and isinstance(delta, LowRank)


def _scales(scales: Sequence[float] | None, infos: Sequence[PatchInfo]) -> tuple[float, ...]:
    if not scales:
        return (1.0,) * len(infos)
    if len(scales) != len(infos):
        raise BadInput(
            "`scales` does not have one factor for each patch",
            details=[f"expected {len(infos)}, in the order of the patches   found {len(scales)}"],
            hint="give `scales=1` for a patch that is to stay as it is",
        )
    given: Sequence[object] = scales
    strange = [scale for scale in given if not isinstance(scale, int | float)]
    if strange:
        raise BadInput(f"`scales` holds {strange[0]!r}, which is no number", details=["expected some as [1, 0.5]"])
    wrong = [scale for scale in scales if not (scale > 0 and math.isfinite(scale))]
    if wrong:
        raise BadInput(f"`scales={wrong[0]:g}` is not above 0", hint="leave out a patch that is not to count")
    return tuple(float(scale) for scale in scales)


def _warn(
    infos: Sequence[PatchInfo],
    scales: Sequence[float],
    union: FactUnion,
    together: Collection[int],
    report: Reporter,
) -> None:
    """Note and warn of what a sum does that one may not expect."""
    for parent in outer_parents(infos):
        report.note(f"the result still needs patch {parent[:12]}, which one of them was made on top of")
    scale = {info.id: factor for info, factor in zip(infos, scales, strict=True)}
    for info in infos:
        for parent in info.manifest.parents:
            if scale.get(parent, 1.0) != 1.0:
                report.warn(
                    f"{called(info)} was made on top of patch {parent[:12]} as it is, not at {scale[parent]:g}"
                )
    added = [fact for fact in union.repeated if not set(fact.patches) <= set(together)]
    twice = [fact for fact in added if _lands(fact, infos, scales) > 1 + 1e-9]
    if twice:
        first = twice[0]
        names = " and ".join(called(infos[index]) for index in first.patches)
        others = "" if len(twice) == 1 else f" (and {len(twice) - 1} more such facts)"
        report.warn(
            f"{printable(first.text, 80)!r} is edited by {names}{others}: listed once, but its edit lands "
            f"{_lands(first, infos, scales):g} times; `resolve` and `scales` avoid that"
        )


def _warn_of_size(
    infos: Sequence[PatchInfo], scales: Sequence[float], apart: Collection[int], report: Reporter
) -> None:
    """Warn where the sum is as large as changes that break a model."""
    alone = [infos[number].id for number in apart]
    large = warning(the_sum(infos), size_of_sum(parts_by_weight(infos, scales), apart=alone), RESOLVE)
    if large:
        report.warn(large)


def _lands(fact: Repeated, infos: Sequence[PatchInfo], scales: Sequence[float]) -> float:
    """How often a fact's edit counts; a patch made on top of another that has the fact adds only what was missing."""
    ids = {infos[index].id for index in fact.patches}
    return sum(scales[index] for index in fact.patches if not ids & set(infos[index].manifest.parents))
