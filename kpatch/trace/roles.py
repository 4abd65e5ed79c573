"""Averages over facts by what a token is to its prompt, with 95 % intervals by bootstrap over facts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)
DRAWS = 1000
_INTERVAL = (0.025, 0.975)


def role_of(token: int, first: int, last: int, end: int) -> int | None:
    """The index in ROLES of a token, with subject first..last and last token `end`; None before the subject.

    Every token has one role: the subject's last token goes before its first, the prompt's last before the first
    subsequent one. A prompt that ends with its subject has no last token besides.
    """
    if token < first:
        return None
    if token <= last:
        return 2 if token == last else 0 if token == first else 1
    return 5 if token == end else 3 if token == last + 1 else 4


def by_role(grid: Tensor, first: int, last: int) -> Tensor:
    """A fact's grid [T, L] averaged over the tokens of each role: [roles, L], NaN for a role without a token."""
    end = len(grid) - 1
    roles = [role_of(token, first, last, end) for token in range(len(grid))]
    rows = []
    for role in range(len(ROLES)):
        tokens = [token for token, found in enumerate(roles) if found == role]
        rows.append(grid[tokens].mean(0) if tokens else torch.full_like(grid[0], float("nan")))
    return torch.stack(rows)


def resamples(facts: int, seed: int, draws: int = DRAWS) -> Tensor:
    """How often each fact is drawn in each bootstrap sample: [draws, facts] float64, rows sum to `facts`."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(facts, (draws, facts), generator=generator)
    return torch.zeros(draws, facts, dtype=torch.float64).scatter_add_(
        1, picked, torch.ones(draws, facts, dtype=torch.float64)
    )


def means(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Means over facts, those that have a number: values [F, ...] → [...], or [draws, ...] with weights [draws, F]."""
    there = ~values.isnan()
    if weights is None:
        return values.nan_to_num().sum(0) / there.sum(0)
    flat = values.nan_to_num().reshape(len(values), -1)
    found = (weights @ flat) / (weights @ there.reshape(len(values), -1).to(weights.dtype))
    return found.view(len(weights), *values.shape[1:])


def interval(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The 95 % interval of the mean over facts: low and high, NaN where fewer than two facts have a number."""
    low, high = torch.nanquantile(means(values, weights), torch.tensor(_INTERVAL, dtype=torch.float64), dim=0)
    few = (~values.isnan()).sum(0) < 2
    return low.masked_fill(few, float("nan")), high.masked_fill(few, float("nan"))


def effects(grids: Sequence[Tensor], corrupted: Sequence[float], spans: Sequence[tuple[int, int]]) -> Tensor:
    """Indirect effects by role: grids of P[answer] [T, L] and what the corrupted run gives → [F, roles, L]."""
    return torch.stack(
        [by_role(grid - low, first, last) for grid, low, (first, last) in zip(grids, corrupted, spans, strict=True)]
    )
