"""Writing through an RMS norm: the residual that has to be written before the norm so that its output moves as wanted.

Pure functions of tensors, in float64, but for `norm_gain`, which asks the module, and `before_norm`, the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kpatch.models.residual_scale import require_own_norm

if TYPE_CHECKING:
    from kpatch.models.model import Model


def before_norm(model: Model, layer: int, written: Tensor, residuals: Tensor) -> Tensor:
    """What W^l has to put out more so that what its layer adds to the residual stream moves by `residuals`.

    written [n, d] is what W^l puts out now, residuals [n, d] are over the layer's scale → [n, d].
    Raises BadInput where the norm behind W^l norms something else too.
    """
    if not model.family.post_norm:
        return residuals
    require_own_norm(model, layer)
    gain, eps = norm_gain(model.mlp_out(layer), model.width, model.device)
    return pull_back(written, residuals, gain.cpu(), eps)


def require_one_way(model: Model, layers: Sequence[int]) -> None:
    """Refuse layers where a wish of the residual stream cannot be turned back into one of what W^l puts out.

    Raises BadInput where the way between them holds a gate of the token's own, or a norm that experts share.
    """
    for layer in layers:
        model.residual_scale(layer)
        require_own_norm(model, layer)


def norm_gain(norm: torch.nn.Module, width: int, device: torch.device) -> tuple[Tensor, float]:
    """The factor γ [d] that an RMS norm applies, whatever its parametrization (Gemma stores γ − 1), and its ε."""
    eps = float(getattr(norm, "eps", getattr(norm, "variance_epsilon", 1e-6)))
    ones = torch.ones(1, width, device=device, dtype=next(norm.parameters()).dtype)
    gain: Tensor = norm(ones)[0].float() * (1 + eps) ** 0.5
    return gain, eps


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
