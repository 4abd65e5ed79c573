"""R, the layers to edit, from the gap between the plain and the MLP-severed curve.

The rule, on gap_l = plain_l - severed_l of layers 0 to L - 2 (nothing above the last layer reads it):

1. There is an R only if the largest gap is at least a tenth of the total effect.
2. Of all runs of consecutive layers take the one with the largest sum of (gap_l - 0.75 · largest gap): where the gap
   is near its maximum on balance, so that a dip within it does not end it. Of equal ones the widest, then the lowest.
3. If it is wider than a fifth of the stack or than six layers, keep as many as are allowed: those with the largest sum
   of gaps, and of equal ones those nearest to the middle of the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

NEAR = 0.75  # of the largest gap
LEAST = 0.1  # of the total effect
WIDEST = 6  # the most layers that the paper edits (GPT-J: 3 to 8)
SHARE = 5  # at most one layer in five
_TIE = 1e-9


@dataclass(frozen=True)
class Range:
    """R = first..last. gap: its mean gap. margin: that less the mean gap of the best run as wide that shares no layer
    with it, in the same unit; None where there is no room for one."""

    first: int
    last: int
    gap: float
    margin: float | None

    @property
    def layers(self) -> list[int]:
        return list(range(self.first, self.last + 1))

    @property
    def width(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True)
class Stability:
    """R over bootstrap samples of the facts: how often it is the same, how often there is none, how often each layer
    is in it, all as shares of the samples; and the ranges found, the most frequent first."""

    same: float
    none: float
    layers: tuple[float, ...]
    ranges: tuple[tuple[int, int, float], ...]


def widest(layers: int) -> int:
    """The most layers R may have in a stack of `layers`."""
    return max(1, min(WIDEST, layers // SHARE))


def choose(plain: Sequence[float], severed: Sequence[float], total_effect: float) -> Range | None:
    """R by the rule above from two curves of indirect effects, [L] each; None where MLPs carry too little."""
    layers = len(plain)
    gaps = [a - b for a, b in zip(plain, severed, strict=True)][: layers - 1]
    if not gaps or max(gaps) <= 0 or max(gaps) < LEAST * total_effect:
        return None
    sums = [0.0]
    for gap in gaps:
        sums.append(sums[-1] + gap)
    first, end = _near_the_top(gaps, sums)
    most = widest(layers)
    if end - first > most:
        middle = (first + end - most) / 2
        _, _, first = max(
            (round((sums[at + most] - sums[at]) / _TIE), -abs(at - middle), at) for at in range(first, end - most + 1)
        )
        end = first + most
    width = end - first
    mean = (sums[end] - sums[first]) / width
    others = [
        (sums[at + width] - sums[at]) / width
        for at in range(len(gaps) - width + 1)
        if at + width <= first or at >= end
    ]
    return Range(first, end - 1, mean, mean - max(others) if others else None)


def _near_the_top(gaps: Sequence[float], sums: Sequence[float]) -> tuple[int, int]:
    """Step 2: the run [first, end)."""
    bar = NEAR * max(gaps)
    _, _, first, end = max(
        (round((sums[end] - sums[first] - bar * (end - first)) / _TIE), end - first, -first, end)
        for first in range(len(gaps))
        for end in range(first + 1, len(gaps) + 1)
    )
    return -first, end


def stability(found: Range | None, samples: Sequence[Range | None], layers: int) -> Stability:
    """How `found` holds over R chosen from bootstrap samples."""
    count = len(samples)
    ranges = Counter((r.first, r.last) for r in samples if r is not None)
    inside = Counter(layer for r in samples if r is not None for layer in r.layers)
    same = ranges[found.first, found.last] if found is not None else samples.count(None)
    return Stability(
        same=same / count,
        none=samples.count(None) / count,
        layers=tuple(inside[layer] / count for layer in range(layers)),
        ranges=tuple((a, b, times / count) for (a, b), times in ranges.most_common(5)),
    )
