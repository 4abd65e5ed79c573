"""The MEMIT update of one layer: pure functions of keys, residuals and the covariance, in float64.

Source: Meng et al. 2023 (MEMIT), eq. 14: Δ = R K^T (C + K K^T)^{-1} with C = λ E[k k^T].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kpatch.errors import BadInput


@dataclass(frozen=True)
class Preserved:
    """What a layer must go on doing: the Cholesky factor [f, f] of C = λ E[k k^T] (+ Σ K_p K_p^T)."""

    factor: Tensor

    @staticmethod
    def of(second_moment: Tensor, weight: float, ridge: float = 0.0, earlier: Tensor | None = None) -> Preserved:
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
                hint="collect it on more text: --tokens, or another --corpus",
            )
        return Preserved(factor)

    def inverse_times(self, columns: Tensor) -> Tensor:
        """C^{-1} columns, [f, n]."""
        solved: Tensor = torch.cholesky_solve(columns, self.factor)
        return solved

    def leverage(self, keys: Tensor) -> Tensor:
        """q_i = k_i^T C^{-1} k_i for keys [f, n] → [n]: alone, a fact gets the share q / (1 + q) of its residual."""
        whitened: Tensor = torch.linalg.solve_triangular(self.factor, keys.double(), upper=False)
        return whitened.square().sum(0)


def update(keys: Tensor, residuals: Tensor, preserved: Preserved) -> tuple[Tensor, Tensor]:
    """Δ = left @ right in the orientation [out, in]: keys [f, n], residuals [d, n] → left [d, r], right [r, f].

    For n < f the n × n Woodbury form R (I + K^T C^{-1} K)^{-1} (C^{-1} K)^T; else f × f with left = R K^T, r = f.
    """
    k, r = keys.double(), residuals.double()
    f, n = k.shape
    if n < f:
        ck = preserved.inverse_times(k)  # (f, n)
        gram = torch.eye(n, dtype=k.dtype, device=k.device) + k.T @ ck  # (n, n)
        left = torch.cholesky_solve(r.T, torch.linalg.cholesky(gram)).T  # (d, n)
        return left, ck.T
    c = preserved.factor @ preserved.factor.T
    total = torch.linalg.cholesky(c + k @ k.T)  # (f, f)
    return (r @ k.T), torch.cholesky_inverse(total)


def nearest_on_norm(target: Tensor, gain: Tensor) -> Tensor:
    """The point nearest to `target` that an RMS norm with `gain` can put out, divided by the gain.

    target [..., d], gain γ [d] → u [..., d] with ‖u‖² = d that minimizes ‖γ ⊙ u − target‖.
    Stationarity gives u = γ ⊙ target / (γ² + μ); μ ≥ −min γ² is found by bisection, ‖u‖ falling in μ. Where even
    μ = −min γ² leaves ‖u‖ too short, the length that lacks goes where it costs least, to the entry of least γ².
    """
    t, g = target.double(), gain.double()
    d = t.shape[-1]
    above = g**2 - (g**2).min()  # near the pole the distance from it is what counts: bisect on that
    gt = g * t
    low, high = torch.zeros_like(t[..., 0]), gt.norm(dim=-1) + 1e-30  # at `high`, ‖u‖ ≤ 1
    for _ in range(200):
        middle = (low + high) / 2
        too_long = (gt / (above + middle[..., None])).square().sum(-1) > d
        low, high = torch.where(too_long, middle, low), torch.where(too_long, high, middle)
    u: Tensor = gt / (above + high[..., None])
    lacking = (d - u.square().sum(-1)).clamp(min=0)
    least = int(above.argmin())
    u[..., least] = torch.copysign((u[..., least] ** 2 + lacking).sqrt(), u[..., least])
    return u


def pull_back(written: Tensor, residuals: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The residual to write before an RMS norm so that its output moves by `residuals`, as far as it can.

    written y [n, d] is what W^l writes now, residuals [n, d] what the residual stream lacks → [n, d].
    The norm swallows scale, so y keeps its own: y' = rms(y) u with γ ⊙ u nearest to norm(y) + residual.
    """
    y = written.double()
    rms = (y.square().mean(-1, keepdim=True) + eps).sqrt()
    target = gain.double() * y / rms + residuals.double()
    return nearest_on_norm(target, gain) * rms - y
