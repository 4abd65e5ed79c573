"""The MEMIT update of one layer: pure functions of keys, residuals and the covariance, in float64.

Source: Meng et al. 2023 (MEMIT), eq. 14: Δ = R K^T (C + K K^T)^{-1} with C = λ E[k k^T]. `update_apart` is the same
least squares with several keys a fact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kpatch.edit.keys import Block
from kpatch.errors import BadInput
from kpatch.reporter import SILENT, Reporter
from kpatch.stats.moment import ridge_for


@dataclass(frozen=True)
class KeyCovariance:
    """What a layer must go on doing: the Cholesky factor [m, m] of C = λ E[k k^T] (+ Σ K_p K_p^T).

    `basis` U [f, m], orthonormal, confines an update to its span: Δ = Δ U U^T, and C is that of the coordinates U^T k.
    Without it every direction may be written to, and m = f.
    """

    factor: Tensor
    basis: Tensor | None = None

    @staticmethod
    def of(second_moment: Tensor, weight: float, ridge: float = 0.0, earlier: Tensor | None = None) -> KeyCovariance:
        """C from E[k k^T] [f, f] float64, its weight λ, a ridge on the mean, and the keys [f, p] of earlier patches.

        Raises BadInput when C is not positive definite.
        """
        c = second_moment.double() * weight
        if ridge:
            c = c + torch.eye(len(c), dtype=c.dtype, device=c.device) * (ridge * weight)
        if earlier is not None:
            c = c + earlier.double() @ earlier.double().T
        factor, failed = torch.linalg.cholesky_ex(c)
        if bool(failed) or not torch.isfinite(factor).all():
            raise BadInput(
                "The covariance of the keys is not positive definite",
                details=["some units of the MLP never fire in the text it was collected on"],
                hint="collect it on more text: more `tokens`, or another `corpus`",
            )
        return KeyCovariance(factor)

    def with_keys(self, blocks: Iterable[Tensor]) -> KeyCovariance:
        """C + Σ k k^T over more keys that must keep their meaning, in blocks [f, p]."""
        total = self.factor @ self.factor.T
        for keys in blocks:
            k = self.coordinates(keys.double())
            total += k @ k.T
        return KeyCovariance(torch.linalg.cholesky(total), self.basis)

    def coordinates(self, keys: Tensor) -> Tensor:
        """What of keys [f, n] an update can see: U^T k [m, n]."""
        return keys if self.basis is None else self.basis.T @ keys

    def lifted(self, rows: Tensor) -> Tensor:
        """Rows [r, m] that take coordinates as rows [r, f] that take keys."""
        return rows if self.basis is None else rows @ self.basis.T

    def inverse_times(self, columns: Tensor) -> Tensor:
        """C^{-1} columns, [m, n]."""
        solved: Tensor = torch.cholesky_solve(columns, self.factor)
        return solved

    def leverage(self, keys: Tensor) -> Tensor:
        """q_i = k_i^T C^{-1} k_i for keys [f, n] → [n]: alone, a fact gets the share q / (1 + q) of its residual."""
        whitened: Tensor = torch.linalg.solve_triangular(self.factor, self.coordinates(keys.double()), upper=False)
        return whitened.square().sum(0)


def key_covariance(
    layer: int, mean: Tensor, weight: float, earlier: Tensor | None = None, report: Reporter = SILENT
) -> KeyCovariance:
    """C of `layer` from E[k k^T] [f, f] and its weight λ, with the keys [f, p] of earlier patches.

    Where keys are dependent a ridge makes C positive definite, and a note names it.
    """
    ridge = ridge_for(mean)
    if ridge:
        report.note(f"layer {layer}: its keys are dependent; a ridge of {ridge:.2g} is added to their covariance")
    return KeyCovariance.of(mean, weight, ridge, earlier)


def update(keys: Tensor, residuals: Tensor, preserved: KeyCovariance) -> tuple[Tensor, Tensor]:
    """Δ = left @ right in the orientation [out, in]: keys [f, n], residuals [d, n] → left [d, r], right [r, f].

    For n < m the n × n Woodbury form R (I + K^T C^{-1} K)^{-1} (C^{-1} K)^T, where left = R has a column a fact; else
    m × m with left = R K^T, r = m. K stands for the keys' coordinates, and m is f where `preserved` has no basis.
    """
    k, r = preserved.coordinates(keys.double()), residuals.double()
    m, n = k.shape
    if n < m:
        ck = preserved.inverse_times(k)  # (m, n)
        gram = torch.eye(n, dtype=k.dtype, device=k.device) + k.T @ ck  # (n, n)
        return r, preserved.lifted(torch.cholesky_solve(ck.T, torch.linalg.cholesky(gram)))  # (d, n), (n, f)
    c = preserved.factor @ preserved.factor.T
    total = torch.linalg.cholesky(c + k @ k.T)  # (m, m)
    return (r @ k.T), preserved.lifted(torch.cholesky_inverse(total))


def update_apart(blocks: Iterable[Block], residuals: Tensor, preserved: KeyCovariance) -> tuple[Tensor, Tensor]:
    """Δ = left @ right where each fact has several keys, each of which is asked for the fact's residual by itself.

    blocks of keys k_ij, shares w_ij and owners, the fact of each key; residuals [d, n] → left [d, r], right [r, f],
    r = min(n, f). With M [f, n] the facts' weighted sums Σ_j w_j k_j, Δ = R M^T (C + Σ w k k^T)^{-1} minimizes
    Σ_i Σ_j w_ij ‖Δ k_ij − r_i‖² + tr(Δ C Δ^T). Woodbury for fewer than f keys. Of more, sums alone are held, and
    never more than f keys and one block beside them.
    """
    r = residuals.double()
    f, n = len(preserved.factor), r.shape[1]  # fewer than the keys have where `preserved` has a basis
    m = r.new_zeros(f, n) if n < f else None
    left = None if n < f else r.new_zeros(len(r), f)  # R M^T
    total, waiting, count = None, list[Tensor](), 0
    for block in blocks:
        roots = block.shares.double().sqrt()
        h = preserved.coordinates(block.rows.double().T) * roots  # (f, b)
        if m is not None:
            m.index_add_(1, block.owner, h * roots)
        if left is not None:
            facts, place = torch.unique(block.owner, return_inverse=True)
            some = h.new_zeros(f, len(facts)).index_add_(1, place, h * roots)
            left += r[:, facts] @ some.T
        waiting.append(h)
        count += h.shape[1]
        if count >= f:
            total = _added(total, waiting, preserved)
            waiting, count = [], 0
    if total is None and m is not None:
        h = torch.cat(waiting, dim=1)  # (f, B)
        ch = preserved.inverse_times(h)
        gram = torch.eye(h.shape[1], dtype=h.dtype, device=h.device) + h.T @ ch  # (B, B)
        right = preserved.inverse_times(m) - ch @ torch.cholesky_solve(ch.T @ m, torch.linalg.cholesky(gram))  # (f, n)
        return r, preserved.lifted(right.T)
    factor = torch.linalg.cholesky(_added(total, waiting, preserved))
    if m is not None:
        return r, preserved.lifted(torch.cholesky_solve(m, factor).T)
    assert left is not None
    return left, preserved.lifted(torch.cholesky_inverse(factor))


def _added(total: Tensor | None, columns: list[Tensor], preserved: KeyCovariance) -> Tensor:
    """C + Σ h h^T: the sum so far [f, f], None for C alone, and more columns."""
    total = preserved.factor @ preserved.factor.T if total is None else total
    if columns:
        h = torch.cat(columns, dim=1)
        total += h @ h.T
    return total
