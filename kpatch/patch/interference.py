"""How much one patch's delta moves what another patch wrote: ‖Δ_a K_b‖ against ‖Δ_b K_b‖, layer by layer.

K_b are the keys that patch b stores with its facts and R_b = Δ_b K_b is what it wrote there. A patch that leaves
Δ_a K_b small leaves the facts of b alone; a ratio of 1 writes over them as much as b wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from kpatch.patch.combine import text_of
from kpatch.patch.container import ITEM_SIZE, open_regular, read_exactly
from kpatch.patch.delta import Delta, LowRank
from kpatch.patch.fingerprint import tensor_from
from kpatch.patch.format import read_delta, read_tensor
from kpatch.patch.header import KEYS, PatchInfo
from kpatch.patch.joint import RowLabel
from kpatch.patch.manifest import Manifest
from kpatch.patch.summands import Part, labels, solvable

# Above this ratio kpatch warns: so large a part of what a patch wrote at its own keys is written over.
STRONG = 0.5


@dataclass(frozen=True)
class Interference:
    """What patch `by` does to the keys of patch `on` (positions among the patches) through one weight.

    `moved` is ‖Δ_by K_on‖ and `own` ‖Δ_on K_on‖ (Frobenius), both with the patches' scales; `fact` is the text of the
    fact whose key suffers most, `worst` that key's own ratio.
    """

    by: int
    on: int
    layer: int
    weight: str
    moved: float
    own: float
    fact: str
    worst: float

    @property
    def ratio(self) -> float:
        """moved / own; 0 where both are 0."""
        return _ratio(self.moved, self.own)

    def to_dict(self, ids: Sequence[str]) -> dict[str, Any]:
        """The JSON object; `ids` are the patches' ids."""
        return {
            "by": ids[self.by],
            "on": ids[self.on],
            "layer": self.layer,
            "weight": self.weight,
            "moved": self.moved,
            "own": self.own,
            "ratio": self.ratio,
            "worst": {"fact": self.fact, "ratio": self.worst},
        }


def stored_keys(info: PatchInfo, weight: str) -> Tensor | None:
    """The keys [f, n] that a patch stores for a weight it changes, float64; None where it stores none."""
    name = keys_name(info, weight)
    return None if name is None else read_tensor(info, name).double().T


def sampled_keys(info: PatchInfo, weight: str, most: int) -> Tensor | None:
    """At most `most` of those keys [f, n], evenly spread, in float32; None where there are none.

    Only their bytes are read, and not hashed: enough for rates that are reported.
    """
    name = keys_name(info, weight)
    if name is None or not info.entries[name].shape[0]:
        return None
    entry = info.entries[name]
    count, width = entry.shape
    row = width * ITEM_SIZE[entry.dtype]
    chosen = sorted({index * count // min(most, count) for index in range(min(most, count))})
    with open_regular(info.path) as handle:
        rows = [read_exactly(handle, entry.begin + index * row, row) for index in chosen]
    return torch.stack([tensor_from(data, entry.dtype, (width,)).float() for data in rows]).T


def keys_name(info: PatchInfo, weight: str) -> str | None:
    """The tensor that holds the keys of a weight; None where the patch has none, or none as long as W's input."""
    manifest, shape = info.manifest, info.manifest.base.weights[weight].shape
    name = f"{KEYS}{manifest.layer_of(weight)}"
    if name not in manifest.tensors or len(shape) != 2:
        return None
    width = shape[0] if manifest.transposed(weight) else shape[1]
    return name if manifest.tensors[name].shape[1] == width else None


def interference(
    patches: Sequence[PatchInfo], weight: str, deltas: Mapping[int, Delta], keys: Mapping[int, Tensor]
) -> list[Interference]:
    """Every ordered pair of patches on one weight; `deltas` and `keys` [f, n] are by position among the patches."""
    found = []
    for on, k in sorted(keys.items()):
        manifest = patches[on].manifest
        transposed, layer = manifest.transposed(weight), manifest.layer_of(weight) or 0
        written = apply_to(deltas[on], k, transposed).norm(dim=0)  # [n]
        facts = _facts_of_rows(manifest, layer)
        for by, delta in sorted(deltas.items()):
            if by == on:
                continue
            moved = apply_to(delta, k, transposed).norm(dim=0)  # [n]
            ratios = [_ratio(a, b) for a, b in zip(moved.tolist(), written.tolist(), strict=True)]
            worst = max(range(len(ratios)), key=ratios.__getitem__)
            found.append(
                Interference(
                    by, on, layer, weight, float(moved.norm()), float(written.norm()), facts[worst], ratios[worst]
                )
            )
    return found


def strong_pairs(
    patches: Sequence[PatchInfo], weights: Sequence[Mapping[int, str]], new: int, most: int = 64
) -> list[tuple[int, int]]:
    """The pairs (by, on) of patches, by position, where `by` moves a weight's keys of `on` by more than STRONG.

    `weights` has for each weight its name in every patch that changes it. Only pairs with one of the last `new`
    patches are looked at, and at most `most` of a patch's keys. The keys of a patch made on top of `by` are what `by`
    makes them, so that pair is left out, and so are two that are solved together. Raises Damaged for a patch that is
    not sound.
    """
    first = len(patches) - new
    found: set[tuple[int, int]] = set()
    for names in weights:
        if len(names) < 2 or max(names) < first:
            continue
        together = solved_together(patches, names)
        if len(together) == len(names):
            continue
        keys = {on: k for on, name in names.items() if (k := sampled_keys(patches[on], name, most)) is not None}
        deltas = {number: read_delta(patches[number], name) for number, name in names.items()} if keys else {}
        for on, k in keys.items():
            manifest = patches[on].manifest
            transposed = manifest.transposed(names[on])
            own = float(apply_to(deltas[on], k.double(), transposed).norm())
            for by, delta in deltas.items():
                under = {patches[by].id, *patches[by].manifest.holds(patches[by].id)}
                if by == on or {by, on} <= together or max(by, on) < first or under & set(manifest.parents):
                    continue
                if _ratio(float(apply_to(delta, k.double(), transposed).norm()), own) > STRONG:
                    found.add((by, on))
    return sorted(found)


def solved_together(patches: Sequence[PatchInfo], names: Mapping[int, str]) -> set[int]:
    """Positions of the patches that take each other into account on a weight; `names` has its name in each."""
    order = list(names)
    return {order[place] for place in solvable([Part(patches[number], names[number]) for number in order])}


def added_subjects(
    patches: Sequence[PatchInfo], weights: Sequence[Mapping[int, str]], new: int
) -> list[tuple[int, int, int]]:
    """Pairs of patches that are solved together and change other facts about the same subjects, with their number.

    One key cannot be asked for two things, so these are added. `weights` and `new` are as for `strong_pairs`; a patch
    made on top of another has learned the other's facts about its subjects again.
    """
    first, most = len(patches) - new, dict[tuple[int, int], int]()
    related = _related(patches)
    for names in weights:
        together = sorted(solved_together(patches, names))
        by_name = dict[str, list[tuple[int, RowLabel]]]()
        for number in together:
            for row in labels(patches[number].manifest, names[number]):
                for name in row.about:
                    by_name.setdefault(name, []).append((number, row))
        subjects = dict[tuple[int, int], set[str]]()
        for rows in by_name.values():
            for (one, row), (other, there) in combinations(rows, 2):
                if one != other and row.facts != there.facts and (one, other) not in related:
                    subjects.setdefault((one, other), set()).add(row.subject)
        for pair, found in subjects.items():
            if max(pair) >= first:
                most[pair] = max(len(found), most.get(pair, 0))
    return [(one, other, count) for (one, other), count in sorted(most.items())]


def _related(patches: Sequence[PatchInfo]) -> set[tuple[int, int]]:
    """Pairs (one, other) of positions, the lower first, of which one was made on top of the other."""
    ids = [{info.id, *info.manifest.holds(info.id)} for info in patches]
    parents = [set(info.manifest.parents) for info in patches]
    pairs = combinations(range(len(patches)), 2)
    return {(one, other) for one, other in pairs if ids[one] & parents[other] or ids[other] & parents[one]}


def warning(by: str, on: str) -> str:
    """The warning for such a pair, given the patches' names."""
    return (
        f"{by} moves keys of {on} by more than {STRONG:.0%} of what that wrote there; facts of {on} may be lost."
        " `kpatch stack --resolve` solves the facts of MEMIT patches again, together"
    )


def apply_to(delta: Delta, keys: Tensor, transposed: bool) -> Tensor:
    """Δ K [d, n] in float64 for keys [f, n]; `transposed` where W, and so Δ, is stored [in, out]."""
    if isinstance(delta, LowRank):
        left, right = delta.left.double(), delta.right.double()
        return right.T @ (left.T @ keys) if transposed else left @ (right @ keys)
    dense = delta.dense(torch.float64)
    return (dense.T if transposed else dense) @ keys


def _facts_of_rows(manifest: Manifest, layer: int) -> list[str]:
    """The text of the first fact that each row of a layer's keys stands for; "" for a fact of another patch."""
    if not manifest.groups:
        return [text_of(fact) for fact in manifest.facts]
    rows = [group["facts"] for group in manifest.groups if layer in group["layers"]]
    return [text_of(manifest.facts[row[0]]) if row else "" for row in rows]


def _ratio(moved: float, own: float) -> float:
    return moved / own if own else float("inf") if moved else 0.0
