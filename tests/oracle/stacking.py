"""The sum of several patches of one weight, straight from the least squares that it stands for: with C at hand.

One fact asks for r at its key k. Facts asked for together, with C of what must stay, give

    Δ = Σ_i r_i k_i^T (C + Σ_i k_i k_i^T)^-1        (Meng et al. 2023, eq. 14)

and facts asked for later, on top of Δ, give the same with the earlier keys in C and r less what Δ does already.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Fact = tuple[Tensor, Tensor]  # k [f], r [d]


def solution(c: Tensor, facts: Sequence[Fact]) -> Tensor:
    """Δ [d, f] of facts asked for together."""
    whole, asked = c.clone(), torch.zeros(len(facts[0][1]), len(c), dtype=c.dtype)
    for k, r in facts:
        whole += torch.outer(k, k)
        asked += torch.outer(r, k)
    return asked @ torch.linalg.inv(whole)


def with_keys(c: Tensor, facts: Sequence[Fact]) -> Tensor:
    """C with the keys of earlier facts in it."""
    for k, _ in facts:
        c = c + torch.outer(k, k)
    return c


def factors(c: Tensor, facts: Sequence[Fact]) -> tuple[Tensor, Tensor, Tensor]:
    """What a patch stores: residuals [d, n], directions [n, f] and keys [n, f], a row for each fact."""
    whole = torch.linalg.inv(with_keys(c, facts))
    keys = torch.stack([k for k, _ in facts])
    return torch.stack([r for _, r in facts], dim=1), keys @ whole, keys


def on_top(below: Tensor, facts: Sequence[Fact]) -> list[Fact]:
    """The facts as they are asked for where Δ `below` is there already."""
    return [(k, r - below @ k) for k, r in facts]
