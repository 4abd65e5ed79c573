"""A matrix that can only be multiplied with, as a product of two thin factors: a randomized SVD that grows its rank.

Source: Halko, Martinsson, Tropp, "Finding structure with randomness" (2011), algorithm 4.4 (power iterations); the
basis grows in blocks with an error known exactly after each, as in Yu, Gu, Li, "Efficient randomized algorithms for
the fixed-precision low-rank matrix approximation" (2018): for orthonormal Q, ‖D − QQᵀD‖² = ‖D‖² − ‖QᵀD‖².
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kpatch.patch.delta import LowRank

_FIRST, _LARGEST = 16, 128  # columns of the first block, and of the largest
# How much more than those just found the next columns may hold, before hope of reaching the tolerance is given up.
_HOPE = 1.5
_LEAST = 1e-7


class Matrix(Protocol):
    """What is asked of D [rows, cols]: its shape, and products in float64."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def times(self, x: Tensor) -> Tensor:
        """D x, [rows, n] for x [cols, n]."""

    def transposed_times(self, y: Tensor) -> Tensor:
        """Dᵀ y, [cols, n] for y [rows, n]."""


def low_rank(matrix: Matrix, norm: float, tolerance: float, limit: int, seed: int = 0) -> LowRank | None:
    """Float64 factors with ‖D − left @ right‖ <= tolerance · ‖D‖ (Frobenius) and the fewest columns for that.

    `norm` is ‖D‖; a tolerance below 1e-7 counts as that, for sums of squares in float64 tell no smaller error. None
    where more than `limit` columns are needed, as soon as that shows: when not even columns that held half as much
    again as the last ones found could do it.
    """
    rows, cols = matrix.shape
    generator = torch.Generator().manual_seed(seed)
    total, goal = norm**2, (max(tolerance, _LEAST) * norm) ** 2
    q, b = torch.zeros(rows, 0, dtype=torch.float64), torch.zeros(0, cols, dtype=torch.float64)
    left_out, size = total, _FIRST
    while left_out > goal:
        size = min(size, min(rows, cols) - q.shape[1])
        if size <= 0 or q.shape[1] >= limit:
            break
        new_q, new_b = _grow(matrix, q, b, torch.randn(cols, size, generator=generator, dtype=torch.float64))
        held = float(new_b.square().sum())
        q, b = torch.cat([q, new_q], dim=1), torch.cat([b, new_b])
        left_out = max(total - float(b.square().sum()), 0.0)
        if left_out - _HOPE * held / size * max(limit - q.shape[1], 0) > goal:
            return None
        size = min(2 * size, _LARGEST)
    u, s, vh = torch.linalg.svd(b, full_matrices=False)  # [q, q], [q], [q, cols]
    without = s.square().flip(0).cumsum(0).flip(0) + left_out  # [q]: the square of what is lost with those before only
    rank = max(1, int((without > goal).sum()))
    if rank > limit or (left_out > goal and q.shape[1] < min(rows, cols)):
        return None
    root = s[:rank].sqrt()
    return LowRank((q @ u[:, :rank]) * root, root[:, None] * vh[:rank])


def _grow(matrix: Matrix, q: Tensor, b: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """More columns for the basis q [rows, k], and their products with D; b = qᵀ D [k, cols], omega [cols, n]."""
    y = _orthonormal(matrix.times(omega) - q @ (b @ omega), q)
    z = matrix.transposed_times(y) - b.T @ (q.T @ y)  # one power iteration: (D Dᵀ) D omega
    z = torch.linalg.qr(z)[0]
    y = _orthonormal(matrix.times(z) - q @ (b @ z), q)
    return y, matrix.transposed_times(y).T


def _orthonormal(y: Tensor, q: Tensor) -> Tensor:
    """An orthonormal basis of y's columns at right angles to q's; twice, for once leaves rounding behind."""
    for _ in range(2):
        y = torch.linalg.qr(y - q @ (q.T @ y))[0]
    return y
