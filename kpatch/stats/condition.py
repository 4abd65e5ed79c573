"""Is a second moment fit to be solved with: finite, positive, and far enough from singular."""

from __future__ import annotations

import torch
from torch import Tensor

from kpatch.errors import BadInput
from kpatch.stats.moment import SecondMoment

# Float32 products move the scaled matrix's eigenvalues by up to 4e-7 (measured on SmolLM2, ten batches); below a
# smallest eigenvalue of this the solution would depend on that noise.
WELL_CONDITIONED = 1e-5
_RIDGES = tuple(10.0**power for power in range(-6, 0))
_SOLVES = 12


def check(moment: SecondMoment, where: str = "") -> None:
    """Raise BadInput unless the moment is finite, has no negative diagonal, and saw a key other than zero.

    A zero on the diagonal, a unit that never fired, is no error: `ridge_for` answers it.
    """
    place = where or None
    if moment.count == 0:
        raise BadInput("The covariance holds no tokens", where=place)
    diagonal = moment.diagonal
    if not moment.is_finite():
        raise BadInput(
            "The covariance of the keys is not finite",
            where=place,
            details=["expected finite sums", "found NaN or infinity: the model overflows on some text"],
            hint="load the model in a wider type: --dtype float32 or --dtype bfloat16",
        )
    if bool((diagonal < 0).any()):
        raise BadInput(
            "The covariance of the keys is no second moment",
            where=place,
            details=["expected squares on its diagonal", f"found {float(diagonal.min()):.3g}"],
            hint="remove it from the cache to collect it anew",
        )
    if not bool((diagonal > 0).any()):
        raise BadInput(
            "Every key in the text is zero",
            where=place,
            hint="the layer's MLP does nothing here: edit other layers, or try another --corpus",
        )


def ridge_for(mean: Tensor) -> float:
    """What to add to the diagonal of E[k k^T] [f, f] float64 so that it is safely positive definite; 0 when it is.

    The smallest of 1e-6, 1e-5 … 0.1 times trace / f that lifts the smallest eigenvalue of the matrix scaled to a unit
    diagonal above 1e-5. Scaled, because each entry's rounding goes with its row's and column's size (Demmel 1989,
    "On floating point errors in Cholesky"). Raises BadInput where no such ridge does.
    """
    if smallest_scaled_eigenvalue(mean) >= WELL_CONDITIONED:
        return 0.0
    unit = float(mean.trace()) / mean.shape[0]
    for share in _RIDGES:
        if smallest_scaled_eigenvalue(mean, share * unit) >= WELL_CONDITIONED:
            return share * unit
    raise BadInput(
        "The covariance of the keys is not positive definite",
        details=[f"a ridge of {_RIDGES[-1]:g} of its mean eigenvalue does not make it so"],
        hint="collect it on more text: --tokens, or another --corpus",
    )


def smallest_scaled_eigenvalue(mean: Tensor, ridge: float = 0.0) -> float:
    """λ_min of D^{-1/2} (M + ridge I) D^{-1/2}, D its diagonal, to some percent; 0 where it is not positive.

    By inverse iteration on a Cholesky factor: f³/3 operations against an eigensolver's 4f³/3 or more.
    """
    diagonal = mean.diagonal() + ridge
    if not bool(torch.isfinite(mean).all()) or not bool((diagonal > 0).all()):
        return 0.0
    scale = diagonal.rsqrt()
    scaled = mean * scale[:, None] * scale
    scaled.diagonal().fill_(1.0)
    factor, failed = torch.linalg.cholesky_ex(scaled)
    if int(failed):
        return 0.0
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(len(mean), 4, dtype=mean.dtype, generator=generator).to(mean.device)
    for _ in range(_SOLVES):
        vectors = torch.linalg.qr(torch.cholesky_solve(vectors, factor)).Q
    gram = vectors.T @ torch.cholesky_solve(vectors, factor)
    return 1.0 / float(torch.linalg.eigvalsh((gram + gram.T) / 2)[-1])
