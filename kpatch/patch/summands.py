"""What each of several patches adds to a weight: the one place that says what the sum of patches is.

W becomes round(base + Σ Δ_i), the Δ_i in the order of the patches' ids. A patch that stores what it was solved from
adds what the joint solution gives it (`kpatch.patch.joint`), every other one its delta as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kpatch.facts.conflicts import normal
from kpatch.facts.subjects import names_of
from kpatch.patch.delta import Delta, LowRank
from kpatch.patch.format import Patch, read_delta, read_tensor
from kpatch.patch.header import KEYS, PatchInfo
from kpatch.patch.joint import Asked, Joint, Replaced, RowLabel
from kpatch.patch.manifest import Manifest

# Facts that are replaced: patch id → positions among its facts, by the id of the patch that replaces them.
ReplacedFacts = Mapping[str, Mapping[str, Collection[int]]]


@dataclass(frozen=True, eq=False)
class Part:
    """A patch, the name of a weight in it, and its delta there; `scale` is a factor on what it asks for."""

    patch: PatchInfo | Patch
    weight: str
    scale: float = 1.0

    @property
    def manifest(self) -> Manifest:
        return self.patch.manifest

    @property
    def layer(self) -> int | None:
        """The layer of the weight."""
        return self.manifest.layer_of(self.weight)

    @property
    def by_row(self) -> bool:
        """Whether the patch stores what it was solved from: residuals and directions by row, and the rows' keys."""
        stored = f"{KEYS}{self.layer}" in self.manifest.tensors
        return stored and self.manifest.deltas[self.weight].by_row

    def delta(self) -> Delta:
        """The delta as it is stored, times the scale."""
        if isinstance(self.patch, Patch):
            delta = self.patch.deltas[self.weight]
        else:
            delta = read_delta(self.patch, self.weight)
        if self.scale == 1:
            return delta
        if isinstance(delta, LowRank):
            left, right = delta.left, delta.right
            if self.manifest.transposed(self.weight):  # what is asked for stands in the right factor
                return LowRank(left, right.double() * self.scale)
            return LowRank(left.double() * self.scale, right)
        return delta.to(dtype=torch.float64).scaled(self.scale)

    def keys(self) -> Tensor:
        """The keys [n, f] of the weight's layer."""
        layer = self.layer
        assert layer is not None
        return self.patch.keys[layer] if isinstance(self.patch, Patch) else read_tensor(self.patch, f"{KEYS}{layer}")


def solvable(parts: Sequence[Part]) -> set[int]:
    """Positions of the parts that are solved together; the others are added as they are.

    Those are the ones stored by rows. One that was made on top of some of a stack's parts knows some of the stack's
    rows only; it is added.
    """
    able = {number for number, part in enumerate(parts) if part.by_row}
    there = {identity: number for number, part in enumerate(parts) for identity in _names(part)}
    return {number for number in able if _stands(number, parts, able, there)}


def _names(part: Part) -> set[str]:
    return {part.patch.id, *part.manifest.holds(part.patch.id)}


def _stands(number: int, parts: Sequence[Part], able: set[int], there: Mapping[str, int]) -> bool:
    known = set(parts[number].manifest.parents)
    for below in {there[parent] for parent in known & there.keys()} & able:
        part = parts[below]
        if part.patch.id not in known and not part.manifest.holds(part.patch.id) <= known:
            return False
    return True


class Summands(list[Delta]):
    """What each part adds; `joint` says whether that is other than the deltas as they are stored."""

    joint = False


def summands(parts: Iterable[Part], replaced: ReplacedFacts | None = None) -> Summands:
    """What each part adds to its weight, in the order given; the result of a part does not depend on that order.

    A part that the others do not change is its own delta, bit for bit. Raises Damaged for a patch that is not sound.
    """
    given = list(parts)
    result = Summands(part.delta() for part in given)
    chosen = sorted(solvable(given), key=lambda number: given[number].patch.id)
    if not chosen or (len(chosen) == 1 and not replaced):
        return result
    joint = Joint([asked(given[number], result[number]) for number in chosen], rows_replaced(given, replaced or {}))
    for number, amounts in zip(chosen, joint.amounts(), strict=True):
        changed = _with(result[number], amounts, given[number])
        result.joint = result.joint or changed is not result[number]
        result[number] = changed
    return result


def _with(delta: Delta, amounts: Tensor, part: Part) -> Delta:
    """The delta with other amounts X [d, n] in the place of what it was asked for."""
    assert isinstance(delta, LowRank)
    transposed = part.manifest.transposed(part.weight)
    old = (delta.right.T if transposed else delta.left).double()
    if not torch.isfinite(amounts).all() or torch.equal(amounts, old):
        return delta
    new = old + (amounts - old).float()  # in float32, so that the last bits of the solution do not show
    return LowRank(delta.left, new.T.contiguous()) if transposed else LowRank(new, delta.right)


def asked(part: Part, delta: Delta) -> Asked:
    """What a part that is stored by rows asks of its weight."""
    assert isinstance(delta, LowRank)
    turned = delta.transposed() if part.manifest.transposed(part.weight) else delta
    return Asked(
        part.patch.id,
        turned.left,
        turned.right,
        part.keys(),
        labels(part.manifest, part.weight),
        frozenset(part.manifest.parents),
        frozenset(_names(part)),
    )


def labels(manifest: Manifest, weight: str) -> tuple[RowLabel, ...]:
    """What the rows of a weight's keys are about."""
    facts = [(str(fact["subject"]), str(fact["prompt"])) for fact in manifest.facts]
    rows = key_rows(manifest, manifest.layer_of(weight))
    return tuple(_label(tuple(facts[index] for index in sorted(positions)), first) for positions, first in rows)


@lru_cache(1 << 14)  # twenty patches' rows are asked for weight by weight
def _label(facts: tuple[tuple[str, str], ...], first: bool) -> RowLabel:
    """The label of a row that carries these facts (subject and prompt)."""
    about = frozenset((normal(subject), normal(prompt)) for subject, prompt in facts)
    names = frozenset[str]().union(*(names_of(*fact) for fact in facts))
    return RowLabel(normal(facts[0][0]) if facts else "", about, first, names)


def key_rows(manifest: Manifest, layer: int | None) -> list[tuple[list[int], bool]]:
    """The facts (positions) of each row of a layer's keys, and whether their subject opens its text."""
    if not manifest.groups:
        return [([index], False) for index in range(len(manifest.facts))]
    mine = [group for group in manifest.groups if layer in group["layers"]]
    return [(list(group["facts"]), group.get("first") is True) for group in mine]


def without_facts(manifest: Manifest, gone: Collection[int]) -> set[int]:
    """Positions of all facts that go where those of `gone` do: a row carries every fact of its subject."""
    rows = [set(group["facts"]) for group in manifest.groups] or [{index} for index in range(len(manifest.facts))]
    return {fact for row in rows if row & set(gone) for fact in row}


def rows_replaced(parts: Sequence[Part], replaced: ReplacedFacts) -> Replaced:
    """The rows of each part that carry a replaced fact."""
    found: dict[str, dict[str, frozenset[int]]] = {}
    for by, others in replaced.items():
        found[by] = {}
        for part in parts:
            gone = set(others.get(part.patch.id, ()))
            rows = [
                number for number, (facts, _) in enumerate(key_rows(part.manifest, part.layer)) if gone & set(facts)
            ]
            if rows:
                found[by][part.patch.id] = frozenset(rows)
    return found
