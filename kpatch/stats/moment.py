"""The running second moment of one layer's keys: Σ k k^T, exact to float32 products and float64 sums.

Also whether it is fit to be solved with: finite, positive, and far enough from singular.
Source: Meng et al. 2023 (MEMIT), eq. 15: C = λ E[k k^T], the mean taken over the tokens of a sample of text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kpatch.errors import BadInput

# Float32 products of more tokens than this would lose digits that the float64 sums are there to keep.
_PRODUCT_TOKENS = 4096


class SecondMoment:
    """Σ k k^T over `count` keys k of width f, kept as bands of rows of the upper triangle in float64.

    Band i holds rows i·b to (i+1)·b - 1 from column i·b on, [b, f - i·b]: half the work and the memory of the full
    square, in products large enough to be fast. `total` is the plain packed triangle.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.width = width
        self.count = 0
        # A sixteenth of a wide layer, or what fits two levels of CPU cache
        step = max(256, -(-width // 16 // 64) * 64)
        self._starts = range(0, width, step)
        self._bands = [
            torch.zeros(min(step, width - start), width - start, dtype=torch.float64, device=device)
            for start in self._starts
        ]

    @property
    def device(self) -> torch.device:
        return self._bands[0].device

    def to(self, device: torch.device | str) -> SecondMoment:
        """Move the sums there; returns itself."""
        self._bands = [band.to(device) for band in self._bands]
        return self

    def add(self, keys: Tensor) -> None:
        """Add keys [..., f] of any float dtype, multiplied in float32 on the device they are on."""
        flat = keys.detach().reshape(-1, self.width)  # (T, f)
        for begin in range(0, flat.shape[0], _PRODUCT_TOKENS):
            part = flat[begin : begin + _PRODUCT_TOKENS].float()
            for start, band in zip(self._starts, self._bands, strict=True):
                product = part[:, start : start + band.shape[0]].T @ part[:, start:]  # (b, f - start)
                band += product.to(band.device)
        self.count += flat.shape[0]

    @property
    def diagonal(self) -> Tensor:
        """Σ k_j² of every unit j, [f] float64."""
        return torch.cat([band.diagonal() for band in self._bands])

    def is_finite(self) -> bool:
        return all(bool(torch.isfinite(band).all()) for band in self._bands)

    @property
    def total(self) -> Tensor:
        """The upper triangle of Σ k k^T, row after row: [f (f + 1) / 2] float64."""
        return torch.cat([band[_upper(band)] for band in self._bands])

    @staticmethod
    def from_total(total: Tensor, count: int, device: torch.device | str = "cpu") -> SecondMoment:
        """The moment whose packed triangle is `total`. Raises ValueError when its length is no triangle's."""
        width = round(((8 * total.numel() + 1) ** 0.5 - 1) / 2)
        if total.ndim != 1 or width * (width + 1) // 2 != total.numel() or count < 0:
            raise ValueError(f"{tuple(total.shape)} numbers for {count} tokens are no packed triangle")
        moment = SecondMoment(width, device)
        moment.count = count
        done = 0
        for band in moment._bands:
            upper = _upper(band)
            size = int(upper.sum())
            band[upper] = total[done : done + size].to(band)
            done += size
        return moment

    def merge(self, other: SecondMoment) -> SecondMoment:
        """The moment of both texts together. Raises ValueError for another width."""
        if other.width != self.width:
            raise ValueError(f"keys of width {self.width} and {other.width} do not add")
        both = SecondMoment(self.width, self.device)
        both.count = self.count + other.count
        for into, mine, theirs in zip(both._bands, self._bands, other._bands, strict=True):
            torch.add(mine, theirs.to(mine.device), out=into)
        return both

    def mean(self) -> Tensor:
        """E[k k^T], [f, f] float64, symmetric. Raises ValueError when nothing was added."""
        if self.count == 0:
            raise ValueError("no keys were added")
        full = torch.empty(self.width, self.width, dtype=torch.float64, device=self.device)
        for start, band in zip(self._starts, self._bands, strict=True):
            stop = start + band.shape[0]
            full[start:stop, start:] = band
            full[start:, start:stop] = band.T
            # Products of a band with itself come out symmetric only to rounding: the upper half is the moment.
            square = band[:, : band.shape[0]].triu()
            full[start:stop, start:stop] = square + square.triu(1).T
        return full.div_(self.count)

    def to_tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """What a file keeps: the packed triangle, on the CPU, and the count."""
        return {f"{prefix}total": self.total.cpu(), f"{prefix}count": torch.tensor(self.count)}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Any], prefix: str = "", device: torch.device | str = "cpu") -> SecondMoment:
        """The moment that `to_tensors` took apart. Raises KeyError or ValueError for tensors of another shape."""
        total, count = tensors[f"{prefix}total"], tensors[f"{prefix}count"]
        if total.dtype != torch.float64 or count.numel() != 1:
            raise ValueError(f"{total.dtype} is not the dtype of a second moment")
        return SecondMoment.from_total(total, int(count), device)


def _upper(band: Tensor) -> Tensor:
    return torch.ones(band.shape, dtype=torch.bool, device=band.device).triu()


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
            hint="load the model in a wider type: `dtype=float32` or `dtype=bfloat16`",
        )
    if bool((diagonal < 0).any()):
        raise BadInput(
            "The covariance of the keys is no second moment",
            where=place,
            details=["expected squares on its diagonal", f"found {float(diagonal.min()):.3g}"],
            hint="remove it from the cache to collect it again",
        )
    if not bool((diagonal > 0).any()):
        raise BadInput(
            "Every key in the text is zero",
            where=place,
            hint="the layer's MLP does nothing here: edit other layers, or try another `corpus`",
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
        hint="collect it on more text (`tokens`), or on another `corpus`",
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
