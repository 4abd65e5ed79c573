"""How much a unit's coefficient changes when its trigger loses its first, its last, or some other token.

Source: Geva et al. 2021 (2012.14913), section 3.2: lower layers hang on the last token, upper ones on the whole text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kpatch.models.model import Model
from kpatch.models.partial_forward import align, run_to

REMOVED = ("first", "last", "other")
CUT = 32  # a trigger is read from so many tokens before its end: about a sentence, as in the paper
_TOKENS = 4096  # at a time


@dataclass(frozen=True)
class Prefix:
    """A trigger to try: the unit that it triggers, and its tokens as text has them, without a BOS."""

    unit: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Removal:
    """A unit's coefficient for the whole prefix, and without one of its tokens; None where there is no such token."""

    whole: float
    first: float | None
    last: float | None
    other: float | None

    def change(self, which: str) -> float | None:
        """The relative change, −1 where nothing is left; None without such a token or any coefficient."""
        value = getattr(self, which)
        return None if value is None or not self.whole else float(value / self.whole - 1)


def without_tokens(
    model: Model, layer: int, prefixes: Sequence[Prefix], start: Sequence[int], seed: int
) -> list[Removal]:
    """What removing tokens does to each prefix at `layer`; `start` is put in front of all of them (the BOS).

    The other token is drawn by `seed` from those between the first and the last.
    """
    draw = random.Random(seed)
    rows: list[tuple[int, ...]] = []
    places: list[tuple[int, int | None, int | None]] = []  # rows of the whole, without the first, without another
    for prefix in prefixes:
        whole = len(rows)
        rows.append(prefix.ids)
        first = other = None
        if len(prefix.ids) > 1:
            first = len(rows)
            rows.append(prefix.ids[1:])
        if len(prefix.ids) > 2:
            other = len(rows)
            at = draw.randrange(1, len(prefix.ids) - 1)
            rows.append(prefix.ids[:at] + prefix.ids[at + 1 :])
        places.append((whole, first, other))
    ends = _coefficients(
        model, layer, [(*start, *row) for row in rows], [prefix.unit for prefix in prefixes for _ in _uses(prefix)]
    )
    found = []
    for prefix, (whole, first, other) in zip(prefixes, places, strict=True):
        last = ends[whole][1] if len(prefix.ids) > 1 else None
        found.append(Removal(ends[whole][0], _at(ends, first), last, _at(ends, other)))
    return found


def _uses(prefix: Prefix) -> range:
    """How many rows a prefix takes."""
    return range(min(3, len(prefix.ids)))


def _at(ends: Sequence[tuple[float, float]], row: int | None) -> float | None:
    return None if row is None else ends[row][0]


def _coefficients(
    model: Model, layer: int, rows: Sequence[tuple[int, ...]], units: Sequence[int]
) -> list[tuple[float, float]]:
    """The coefficient of each row's unit at its last token, and at the one before, where it has one."""
    size = max(1, _TOKENS // max(map(len, rows), default=1))
    found: list[tuple[float, float]] = []
    for begin in range(0, len(rows), size):
        some, own = rows[begin : begin + size], torch.tensor(units[begin : begin + size])
        batch = align(some, [len(row) - 1 for row in some], model.pad_id, model.device)
        keys = run_to(model, layer, batch, [layer])[layer][:, -2:].float().cpu()
        ends = keys.gather(2, own[:, None, None].expand(-1, keys.shape[1], 1))[..., 0]
        found += [(row[-1], row[0]) for row in ends.tolist()]
    return found
