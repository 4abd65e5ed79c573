"""The figures of the papers, layer by layer, from what was found; and all of it as one JSON object."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kpatch.memories.layer_memories import LayerMemories
from kpatch.memories.predictions import KINDS, kinds_of
from kpatch.memories.removal import REMOVED
from kpatch.memories.run import Memories, Trigger, UnitMemory
from kpatch.memories.words import as_objects

CERTAIN = 100  # the values that promote one token with the highest probability, of all layers
BINS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # of that probability


@dataclass(frozen=True)
class LayerFigures:
    """One layer's figures; shares are fractions of units or of inputs.

    agreement  units whose value promotes most the very token that follows their strongest trigger; by_sign, of m > 0
    and of m < 0 apart; chance, if triggers were dealt to units at random
    rank  median and quartiles of that token's rank, 1 is top
    same_last  triggers of a unit that end in the unit's most frequent last token
    active, positive, effective  shares of memories, means over inputs
    composed  inputs where no active memory predicts by itself what the layer predicts
    residual  inputs where r predicts what the model does in the end   residual_chance  what r gives it, the mean
    kinds  how what leaves the layer came about
    removal  mean relative change of the coefficient; None where nothing was tried
    """

    layer: int
    agreement: float
    by_sign: tuple[float | None, float | None]
    chance: float
    rank: tuple[float, float, float] | None
    same_last: float
    active: float
    positive: float
    effective: float
    composed: float
    residual: float
    residual_chance: float
    kinds: dict[str, float]
    removal: dict[str, float | None]


class Summary:
    """What `Memories` come to."""

    def __init__(self, memories: Memories) -> None:
        self.memories = memories

    @cached_property
    def layers(self) -> list[LayerFigures]:
        return [self._figures(one) for one in self.memories.layers.values()]

    @cached_property
    def certain(self) -> tuple[int, int]:
        """How many of the values that promote a token most surely have a trigger that goes on with it, of how many."""
        found: list[tuple[float, bool]] = []
        for one in self.memories.layers.values():
            sides = one.stronger()
            fired = one.of_side(one.places, sides)[:, 0] >= 0
            top, chance = one.of_side(one.promoted, sides), one.of_side(one.chances, sides)
            place = one.of_side(one.places, sides)  # (f, T)
            goes_on = ((self._follow(place) == top[:, None]) & (place >= 0)).any(-1)
            best = chance.masked_fill(~fired, -1.0).topk(min(CERTAIN, len(chance))).indices
            found += [(float(chance[i]), bool(goes_on[i])) for i in best.tolist() if fired[i]]
        found.sort(key=lambda pair: -pair[0])
        return sum(goes_on for _, goes_on in found[:CERTAIN]), len(found[:CERTAIN])

    @cached_property
    def by_probability(self) -> list[tuple[float, float, int, float | None]]:
        """Agreement by the probability of the promoted token, of all layers: from, to, units, agreement."""
        agrees, chances = [], []
        for one in self.memories.layers.values():
            agreed, fired, chance = self._agreed(one)
            agrees.append(agreed[fired])
            chances.append(chance[fired])
        agree, chance = torch.cat(agrees).float(), torch.cat(chances)
        rows = []
        for low, high in pairwise(BINS):
            inside = (chance > low) & (chance <= high)
            count = int(inside.sum())
            rows.append((low, high, count, float(agree[inside].mean()) if count else None))
        return rows

    def _agreed(self, one: LayerMemories) -> tuple[Tensor, Tensor, Tensor]:
        """Of each unit's stronger side: whether it agrees, whether anything triggers it, its top probability; [f]."""
        sides = one.stronger()
        first = one.of_side(one.places, sides)[:, 0]
        agreed = self._follow(first) == one.of_side(one.promoted, sides)
        return agreed & (first >= 0), first >= 0, one.of_side(one.chances, sides)

    def _follow(self, places: Tensor) -> Tensor:
        """The token behind each prefix."""
        return self.memories.ids[(places.long() + 1).clamp(min=0)]

    def _figures(self, one: LayerMemories) -> LayerFigures:
        agreed, fired, _ = self._agreed(one)
        sides = one.stronger()
        tops = Counter(one.of_side(one.promoted, sides)[fired].tolist())
        follows = Counter(self._follow(one.of_side(one.places, sides)[:, 0])[fired].tolist())
        count = max(1, int(fired.sum()))
        ranks = one.ranks.double()
        kinds = kinds_of(one.residual_top, one.layer_top, one.out_top)
        return LayerFigures(
            one.layer,
            float(agreed.sum()) / count,
            (self._of_sign(one, 0), self._of_sign(one, 1)),
            sum(tops[token] * follows[token] for token in tops) / count**2,
            None if not len(ranks) else _quartiles(ranks),
            self._same_last(one, sides),
            float(one.active.mean()),
            float(one.positive.mean()),
            float(one.effective.mean()),
            1 - float(one.alone.float().mean()),
            float((one.residual_top == one.final_top).float().mean()),
            float(one.final_chance.mean()),
            {kind: float((kinds == number).float().mean()) for number, kind in enumerate(KINDS)},
            {which: self._removed(one.layer, which) for which in REMOVED},
        )

    def _of_sign(self, one: LayerMemories, side: int) -> float | None:
        first = one.places[side, :, 0]
        fired = first >= 0
        agrees = (self._follow(first) == one.promoted[side])[fired]
        return float(agrees.float().mean()) if len(agrees) else None

    def _same_last(self, one: LayerMemories, sides: Tensor) -> float:
        places = one.of_side(one.places, sides)  # (f, T)
        last = self.memories.ids[places.clamp(min=0).long()]
        shares = [
            max(Counter(tokens[: len(there)]).values()) / len(there)
            for tokens, there in zip(
                last.tolist(), [[p for p in row if p >= 0] for row in places.tolist()], strict=True
            )
            if there
        ]
        return statistics.fmean(shares) if shares else 0.0

    def _removed(self, layer: int, which: str) -> float | None:
        changes = [
            change
            for unit in self.memories.units
            if unit.unit.layer == layer
            for side in unit.sides
            for trigger in side.triggers
            if trigger.removal is not None and (change := trigger.removal.change(which)) is not None
        ]
        return statistics.fmean(changes) if changes else None

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, without the schema's version."""
        memories, (agree, of) = self.memories, self.certain
        return {
            "model": memories.model,
            "corpus": memories.corpus,
            "tokens": memories.tokens,
            "row": memories.row,
            "inputs": max((len(one.active) for one in memories.layers.values()), default=0),
            "layers": [_layer_dict(one) for one in self.layers],
            "certain_values": {"count": of, "agree": agree},
            "agreement_by_probability": [
                {"from": low, "to": high, "units": count, "agreement": share}
                for low, high, count, share in self.by_probability
            ],
            "units": [_unit_dict(unit) for unit in memories.units],
            "seconds": memories.seconds,
        }


def _quartiles(ranks: Tensor) -> tuple[float, float, float]:
    low, middle, high = torch.quantile(ranks, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return low, middle, high


def _layer_dict(one: LayerFigures) -> dict[str, Any]:
    rank = one.rank
    return {
        "layer": one.layer,
        "agreement": one.agreement,
        "agreement_positive": one.by_sign[0],
        "agreement_negative": one.by_sign[1],
        "agreement_by_chance": one.chance,
        "rank": None if rank is None else {"median": rank[1], "quartiles": [rank[0], rank[2]]},
        "same_last_token": one.same_last,
        "active": one.active,
        "positive": one.positive,
        "effective": one.effective,
        "no_single_memory": one.composed,
        "residual_agreement": one.residual,
        "residual_probability": one.residual_chance,
        "predictions": one.kinds,
        "removal": one.removal,
    }


def _unit_dict(one: UnitMemory) -> dict[str, Any]:
    return {
        "layer": one.unit.layer,
        "unit": one.unit.number,
        "sides": [
            {
                "sign": side.sign,
                "promotes": as_objects(side.promotes),
                "rank_of_following": side.rank,
                "agrees": side.agrees,
                "triggers": [_trigger_dict(trigger) for trigger in side.triggers],
            }
            for side in one.sides
        ],
    }


def _trigger_dict(one: Trigger) -> dict[str, Any]:
    removal = one.removal
    return {
        "text": one.text,
        "last": one.last,
        "following": one.following,
        "coefficient": one.coefficient,
        "without_last": one.before,
        "removal": None if removal is None else {which: removal.change(which) for which in REMOVED},
    }
