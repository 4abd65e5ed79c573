"""Weight changes as products of two thin factors: Δ = left @ right, in the orientation in which W is stored.

MEMIT gives Δ in this form (Meng et al. 2023, eq. 14: Δ = R K^T (C + K K^T)^{-1}), with rank at most n, the number of
facts. Norms and inner products go through the Gram matrices of the factors, so Δ itself is never formed for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """Δ = left @ right; left [rows, r], right [r, cols], r >= 1.

    Raises ValueError when the factors do not fit each other.
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[0]:
            raise ValueError(f"Factors {list(self.left.shape)} and {list(self.right.shape)} do not make a product")
        if self.rank < 1:
            raise ValueError("A low-rank delta needs rank 1 or more")

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def stored_numbers(self) -> int:
        return self.left.numel() + self.right.numel()

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Δ [rows, cols], multiplied in float64 and then brought to `dtype`."""
        return (self.left.double() @ self.right.double()).to(dtype)

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows [begin, end) of Δ in float64."""
        return self.left[begin:end].double() @ self.right.double()

    def matmul(self, x: Tensor) -> Tensor:
        """Δ @ x for x [cols, ...], in the wider of the factors' and x's dtype."""
        dtype = torch.promote_types(self.left.dtype, x.dtype)
        return self.left.to(dtype) @ (self.right.to(dtype) @ x.to(dtype))

    def norm(self) -> float:
        """Frobenius norm, through Gram matrices in float64: ‖Δ‖² = tr((LᵀL)(RRᵀ))."""
        return math.sqrt(max(inner(self, self), 0.0))

    def scaled(self, factor: float) -> LowRank:
        """factor · Δ."""
        return LowRank(self.left * factor, self.right)

    def transposed(self) -> LowRank:
        """Δᵀ."""
        return LowRank(self.right.T, self.left.T)

    def truncate(self, tol: float = 1e-7, max_rank: int | None = None) -> LowRank:
        """The same Δ with the fewest columns: QR of both factors, SVD of the small core, in float64.

        Singular values up to `tol` times the largest go, so ‖Δ − result‖₂ <= tol ‖Δ‖₂ when `max_rank` does not bind.
        The factors come back balanced (each carries the square root of the singular values) in float64.
        """
        u, s, vh = self.svd()
        keep = max(1, int((s > tol * s[0]).sum()))
        return _balanced(u, s, vh, keep if max_rank is None else min(keep, max_rank))

    def compact(self, loss: float = 2.0**-24) -> LowRank:
        """The same Δ with the fewest columns for which ‖Δ − result‖ <= loss ‖Δ‖ (Frobenius); float64, balanced.

        The default is half a float32 step: less than what is lost when the factors are stored in float32.
        """
        u, s, vh = self.svd()
        return _balanced(u, s, vh, rank_within(s, loss))

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Δ = U diag(s) Vh in float64, by QR of both factors and an SVD of the small core.

        U [rows, p], s [p] falling, Vh [p, cols], p = min(rows, cols, r).
        """
        q_left, r_left = torch.linalg.qr(self.left.double())  # [rows, p], [p, r]
        q_right, r_right = torch.linalg.qr(self.right.double().T)  # [cols, q], [q, r]
        u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        return q_left @ u, s, vh @ q_right.T


def rank_within(s: Tensor, loss: float) -> int:
    """How many of the singular values s [p], falling, must stay so that the others' norm is at most loss · ‖s‖."""
    left_out = s.square().flip(0).cumsum(0).flip(0).sqrt()  # [p]: what is lost when only those before stay
    return max(1, int((left_out > loss * left_out[0]).sum()))


def _balanced(u: Tensor, s: Tensor, vh: Tensor, keep: int) -> LowRank:
    root = s[:keep].sqrt()
    return LowRank(u[:, :keep] * root, root[:, None] * vh[:keep])


@dataclass(frozen=True, eq=False)
class Dense:
    """Δ stored as it is; delta [rows, cols]. `known_rank` is kept for the manifest when the factors were dropped."""

    delta: Tensor
    known_rank: int | None = None

    def __post_init__(self) -> None:
        if self.delta.ndim != 2:
            raise ValueError(f"A delta has two dimensions, not {self.delta.ndim}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.delta.shape[0], self.delta.shape[1]

    @property
    def rank(self) -> int | None:
        return self.known_rank

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Δ [rows, cols] in `dtype`."""
        return self.delta.to(dtype)

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows [begin, end) of Δ in float64."""
        return self.delta[begin:end].double()

    def matmul(self, x: Tensor) -> Tensor:
        """Δ @ x for x [cols, ...], in the wider of Δ's and x's dtype."""
        dtype = torch.promote_types(self.delta.dtype, x.dtype)
        return self.delta.to(dtype) @ x.to(dtype)

    def norm(self) -> float:
        """Frobenius norm in float64."""
        return float(torch.linalg.vector_norm(self.delta, dtype=torch.float64))

    def scaled(self, factor: float) -> Dense:
        """factor · Δ."""
        return Dense(self.delta * factor, self.known_rank)


Delta: TypeAlias = LowRank | Dense


def smaller(delta: LowRank) -> Delta:
    """The form that stores fewer numbers; a tie keeps the factors. A dense Δ comes back in float32."""
    rows, cols = delta.shape
    if delta.stored_numbers <= rows * cols:
        return delta
    return Dense(delta.dense(torch.float32), min(delta.rank, rows, cols))


def concat(deltas: Sequence[LowRank]) -> LowRank:
    """The sum of low-rank deltas, exactly: factors side by side, ranks add up."""
    dtype = torch.float32
    for delta in deltas:
        dtype = torch.promote_types(dtype, torch.promote_types(delta.left.dtype, delta.right.dtype))
    left = torch.cat([delta.left.to(dtype) for delta in deltas], dim=1)
    return LowRank(left, torch.cat([delta.right.to(dtype) for delta in deltas], dim=0))


def total(deltas: Sequence[Delta]) -> Delta:
    """The sum of deltas of one shape: low rank while all are, else dense in float64.

    Raises ValueError for no deltas or for shapes that differ.
    """
    if not deltas:
        raise ValueError("A sum needs at least one delta")
    if len({delta.shape for delta in deltas}) != 1:
        raise ValueError(f"Deltas of different shapes: {sorted({delta.shape for delta in deltas})}")
    factored = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(factored) == len(deltas):
        return factored[0] if len(factored) == 1 else concat(factored)
    result = deltas[0].dense()
    for delta in deltas[1:]:
        result = result + delta.dense()
    return Dense(result)


def inner(a: Delta, b: Delta) -> float:
    """⟨Δ_a, Δ_b⟩ in float64 without forming a low-rank Δ: tr((L_aᵀ L_b)(R_b R_aᵀ))."""
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        return float(((a.left.double().T @ b.left.double()) * (a.right.double() @ b.right.double().T)).sum())
    if isinstance(a, LowRank):
        return inner(b, a)
    if isinstance(b, LowRank):
        return float(((a.delta.double() @ b.right.double().T) * b.left.double()).sum())
    return float((a.delta.double() * b.delta.double()).sum())
