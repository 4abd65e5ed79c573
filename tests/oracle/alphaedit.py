"""AlphaEdit as its paper writes it: dense matrices, P by a singular value decomposition, one inverse a layer.

Source: Fang et al. 2025 (2410.02355): Δ = R K^T P (K_p K_p^T P + K K^T P + L2 · I)^{-1}. Rows, values and residuals
are those of `tests.oracle.memit`. Nothing here uses kpatch.edit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kpatch.models.model import Model
from tests.oracle import memit as oracle

if TYPE_CHECKING:
    from kpatch.edit.presets import MemitPaperHyper


def projector(moment: Tensor, threshold: float) -> Tensor:
    """P [f, f]: onto the left singular vectors of E[k k^T] whose singular values lie below the threshold."""
    u, s, _ = torch.linalg.svd(moment.double())
    free = u[:, s < threshold]
    return free @ free.T


def solve(k: Tensor, r: Tensor, p: Tensor, l2: float, earlier: Tensor | None = None) -> Tensor:
    """Δ [d, f] for K [f, n], R [d, n], P [f, f] and K_p [f, p]."""
    k, r = k.double(), r.double()
    inner = k @ k.T @ p + l2 * torch.eye(len(p), dtype=torch.float64)
    if earlier is not None:
        inner = inner + earlier.double() @ earlier.double().T @ p
    return r @ k.T @ p @ torch.linalg.inv(inner)


def alphaedit(
    model: Model,
    contexts: Sequence[str],
    facts: Iterable[oracle.Prompt],
    values: MemitPaperHyper,
    threshold: float,
    l2: float,
    covariances: Mapping[int, Tensor],
    earlier: Mapping[int, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Weight name → Δ [out, in] float64; `values` are the settings that decide z."""

    def update(layer: int, k: Tensor, r: Tensor) -> Tensor:
        kept = None if earlier is None else earlier.get(layer)
        return solve(k, r, projector(covariances[layer], threshold), l2, kept)

    return oracle.memit(model, contexts, facts, values, covariances, update=update)
