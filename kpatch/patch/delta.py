"""Weight changes as products of two thin factors: Δ = left @ right, in the orientation in which W is stored.

MEMIT gives Δ in this form (Meng et al. 2023, eq. 14: Δ = R K^T (C + K K^T)^{-1}), with rank at most n, the number of
facts. Norms and inner products go through the Gram matrices of the factors, so Δ itself is never formed for them.

What a weight becomes is decided here too, for a model in memory and for a checkpoint alike: round(base + Σ Δ).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from kpatch.patch.manifest import matrix_shape


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

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> LowRank:
        """The same with its factors on another device, or in another dtype."""
        return LowRank(self.left.to(device, dtype), self.right.to(device, dtype))

    def transposed(self) -> LowRank:
        """Δᵀ."""
        return LowRank(self.right.T, self.left.T)

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

    @property
    def stored_numbers(self) -> int:
        return self.delta.numel()

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

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Dense:
        """The same on another device, or in another dtype."""
        return Dense(self.delta.to(device, dtype), self.known_rank)

    def transposed(self) -> Dense:
        """Δᵀ."""
        return Dense(self.delta.T, self.known_rank)


Delta: TypeAlias = LowRank | Dense

# Entries of a weight that are summed in float64 at a time: few enough to bound the memory, and enough for a fast
# product. A model in memory and a checkpoint use the same blocks, since another shape can change a product's last bit.
BLOCK = 1 << 19


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


def patched_weight(base: Tensor, deltas: Sequence[Delta]) -> Tensor:
    """round(base + Σ Δ) in base's dtype, shape and device: what `apply` writes, bit for bit.

    `base` has any number of dimensions and counts as the matrix [rows, cols] of `matrix_shape`. `deltas` come in the
    order of their patches' ids. Values beyond the dtype's range become Inf, which callers refuse.
    """
    device = torch.device("cpu") if base.device.type == "mps" else base.device  # no float64 there
    wide = [widened(delta).to(device) for delta in deltas]
    result = torch.empty_like(base, memory_format=torch.contiguous_format)
    rows, cols = matrix_shape(base.shape)
    old, new = base.detach().reshape(rows, cols), result.view(rows, cols)
    for begin, end in row_blocks((rows, cols)):
        new[begin:end] = round_sum(old[begin:end].to(device), sum_rows(wide, begin, end), base.dtype)
    return result


def row_blocks(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Rows [begin, end) of each block of a [rows, cols] weight."""
    step = max(1, BLOCK // max(1, shape[1]))
    for begin in range(0, shape[0], step):
        yield begin, min(shape[0], begin + step)


def widened(delta: Delta) -> Delta:
    """The delta with float64 factors, so that they are not converted again for every block."""
    return delta.to(dtype=torch.float64) if isinstance(delta, LowRank) else delta


def sum_rows(deltas: Sequence[Delta], begin: int, end: int) -> Tensor:
    """Rows [begin, end) of Σ Δ in float64, one delta after the other; there is at least one."""
    total = deltas[0].rows(begin, end)
    if len(deltas) > 1 and isinstance(deltas[0], Dense):
        total = total.clone()  # it may be the delta itself
    for delta in deltas[1:]:
        if isinstance(delta, LowRank):  # added as it is multiplied, which saves two passes over the block
            total.addmm_(delta.left[begin:end].double(), delta.right.double())
        else:
            total += delta.rows(begin, end)
    return total


def round_sum(base: Tensor, change: Tensor, dtype: torch.dtype) -> Tensor:
    """round(base + change): added in float64 and rounded once, to `dtype`."""
    return rounded(base.double() + change, dtype)


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 values in a stored dtype: `values.to(dtype)` of torch.

    Round to nearest, ties to even. torch goes from float64 to the 16-bit dtypes by way of float32, so a value within
    2^-25 of a tie may land on its other side; kpatch keeps to that, so that anyone can repeat it with one call.
    """
    return values.to(dtype)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread: with several, the last bits of a product depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
