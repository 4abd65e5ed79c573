"""95 % intervals of rates by the bootstrap: facts are drawn again and again, each with all its prompts.

Source: Efron and Tibshirani 1993, percentile intervals. A fact's paraphrases and neighbors stand or fall together.
So facts are drawn and not prompts (a cluster bootstrap).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kpatch.evaluate.rates import KINDS, Outcome, summarize

SAMPLES = 2000
LEVEL = 0.95
_QUANTITIES = ("success", "magnitude", "accuracy", "free_running")
_AT_ONCE = 1 << 22  # numbers of drawn facts held at a time


def with_intervals(outcomes: Sequence[Outcome], samples: int = SAMPLES, seed: int = 0) -> dict[str, Any]:
    """METRICS of `outcomes` with, beside each number, the interval that 95 % of the drawn samples fall into.

    `interval` is that of success; `magnitude_interval`, `accuracy_interval`, `free_running_interval` and
    `score_interval` are those of what they name. Each is a pair [low, high], or None where there is no number or only
    one fact to draw.
    """
    metrics = summarize(outcomes)
    facts = sorted({outcome.fact for outcome in outcomes})
    drawn = _draw(outcomes, facts, samples, seed) if len(facts) > 1 and samples else None
    for number, kind in enumerate(KINDS):
        if metrics[kind] is None:
            continue
        for place, key in enumerate(_QUANTITIES):
            if key in metrics[kind]:
                name = "interval" if key == "success" else f"{key}_interval"
                metrics[kind][name] = None if drawn is None else interval(drawn[:, number, place])
    metrics["score_interval"] = None if drawn is None else interval(_scores(drawn[:, :, 0]))
    return metrics


def interval(values: Tensor) -> list[float] | None:
    """The middle 95 % of the values [S] that are finite; None where there are none."""
    values = values[values.isfinite()]
    if not len(values):
        return None
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=values.dtype)
    low, high = torch.quantile(values, ends).tolist()
    return [low, high]


def mean_interval(values: Sequence[float], samples: int = SAMPLES, seed: int = 0) -> list[float] | None:
    """The interval of a mean of one number a fact."""
    if len(values) < 2 or not samples:
        return None
    table = torch.tensor(sorted(values), dtype=torch.float64)
    picks = _picks(len(table), samples, seed)
    return interval(torch.cat([table[some].mean(1) for some in picks]))


def grouped_interval(values: Sequence[tuple[int, float]], samples: int = SAMPLES, seed: int = 0) -> list[float] | None:
    """The interval of the mean of values, each with the number of its fact; facts are drawn with all their values."""
    sums: dict[int, tuple[float, int]] = {}
    for fact, value in values:
        total, count = sums.get(fact, (0.0, 0))
        sums[fact] = total + value, count + 1
    if len(sums) < 2 or not samples:
        return None
    table = torch.tensor(sorted(sums.values()), dtype=torch.float64)  # [F, 2]
    drawn = torch.cat([table[some].sum(1) for some in _picks(len(table), samples, seed)])  # [S, 2]
    return interval(drawn[:, 0] / drawn[:, 1])


def _draw(outcomes: Sequence[Outcome], facts: Sequence[int], samples: int, seed: int) -> Tensor:
    """Means [S, kinds, quantities] over drawn facts; NaN where a sample has nothing to average."""
    place = {fact: index for index, fact in enumerate(facts)}
    table = torch.zeros(len(facts), len(KINDS), len(_QUANTITIES), 2, dtype=torch.float64)  # sums and counts
    for outcome in outcomes:
        values = (outcome.success, outcome.magnitude, outcome.accurate, outcome.free)
        for index, value in enumerate(values):
            if value is not None:
                table[place[outcome.fact], KINDS.index(outcome.kind), index] += torch.tensor([float(value), 1.0])
    # The rows are sorted, so that the order of the facts decides nothing
    table = torch.tensor(sorted(table.flatten(1).tolist()), dtype=torch.float64).view_as(table)
    sums = torch.cat([table[some].sum(1) for some in _picks(len(table), samples, seed)])  # [S, kinds, quantities, 2]
    return sums[..., 0] / sums[..., 1]


def _picks(count: int, samples: int, seed: int) -> list[Tensor]:
    """Which facts each sample draws, in parts [s, F]."""
    generator = torch.Generator().manual_seed(seed)
    step = max(1, _AT_ONCE // (count * len(KINDS) * len(_QUANTITIES) * 2))
    sizes = [min(step, samples - begin) for begin in range(0, samples, step)]
    return [torch.randint(count, (size, count), generator=generator) for size in sizes]


def _scores(successes: Tensor) -> Tensor:
    """The harmonic mean of those successes that there are, [S, kinds] → [S]; it is 0 where one of them is 0."""
    there = successes.isfinite()
    inverse = torch.where(there, 1 / successes, 0.0).sum(1)
    return there.sum(1) / inverse
