"""AlphaEdit: MEMIT as its paper has it, whose updates leave alone every direction that keys of text take.

Source: Fang et al. 2025 (AlphaEdit, ICLR, 2410.02355). With U the eigenvectors of E[k k^T] whose eigenvalues lie
below a threshold, and P = U U^T, Δ = R K^T P (K_p K_p^T P + K K^T P + L2 · I)^{-1}; K_p are the keys of earlier
edits. That is ridge regression in the coordinates U^T k: Δ = R X^T (X_p X_p^T + X X^T + L2 · I)^{-1} U^T, X = U^T K.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kpatch.edit.memit_paper import MemitPaper
from kpatch.edit.presets import PRESETS, AlphaEditHyper, HyperParams
from kpatch.edit.solve import KeyCovariance
from kpatch.errors import BadInput
from kpatch.models.model import Model
from kpatch.reporter import Reporter
from kpatch.stats.covariance import Covariance


class AlphaEdit(MemitPaper):
    """Rows, values and residuals of MEMIT's paper; the update is confined to the null space of the covariance."""

    name = "alphaedit"
    hyper: ClassVar[type[HyperParams]] = AlphaEditHyper
    presets = PRESETS["alphaedit"]

    def check(self, model: Model, hyper: AlphaEditHyper, covariance: Covariance) -> None:
        """Raise BadInput for fewer tokens than W has columns, and where the threshold leaves no null space, or all."""
        widest = max(map(model.key_width, covariance.moments))
        if covariance.tokens < widest:
            raise BadInput(
                "The covariance was taken on too little text for a null space",
                details=[
                    f"expected at least {widest:,} tokens, one for each unit of the MLP",
                    f"found {covariance.tokens:,}: every direction that they do not take would count as free",
                ],
                hint="give more `tokens`, or leave them out for ten a unit",
            )
        for layer, moment in covariance.moments.items():
            require_null_space(moment.mean(), hyper.threshold, f"layer {layer} of {model.name}")

    def preserve(
        self,
        model: Model,
        hyper: AlphaEditHyper,
        layer: int,
        mean: Tensor,
        earlier: Tensor | None,
        report: Reporter,
    ) -> KeyCovariance:
        """L2 · I + U^T K_p K_p^T U in the coordinates of the null space U."""
        basis = null_space(mean, hyper.threshold, f"layer {layer} of {model.name}")
        f, m = basis.shape
        report.note(f"layer {layer}: {m} of {f} directions are free to be written to")
        kept = None if earlier is None else basis.T @ earlier.double()
        inner = KeyCovariance.of(torch.eye(m, dtype=basis.dtype, device=basis.device), hyper.l2, 0.0, kept)
        return KeyCovariance(inner.factor, basis)


def null_space(mean: Tensor, threshold: float, where: str = "") -> Tensor:
    """Eigenvectors U [f, m] float64 of E[k k^T] [f, f] whose eigenvalues lie below the threshold.

    Raises BadInput where the threshold is outside the range of the eigenvalues: no direction is free, or all are.
    """
    values, vectors = torch.linalg.eigh(mean.double())  # rising
    free = int((values < threshold).sum())
    if not 0 < free < len(values):
        raise _outside(values, threshold, where)
    basis: Tensor = vectors[:, :free].contiguous()
    return basis


def require_null_space(mean: Tensor, threshold: float, where: str = "") -> None:
    """Raise BadInput as `null_space` does, at a quarter of its cost: E[k k^T] ± threshold · I shows where it lies."""
    shifted = mean.double() - threshold * torch.eye(len(mean), dtype=torch.float64, device=mean.device)
    if _is_positive(shifted) or _is_positive(-shifted):
        raise _outside(torch.linalg.eigvalsh(mean.double()), threshold, where)


def _is_positive(matrix: Tensor) -> bool:
    return not int(torch.linalg.cholesky_ex(matrix).info)


def _outside(values: Tensor, threshold: float, where: str) -> BadInput:
    """What is wrong with a threshold that none or all of the eigenvalues [f], rising, lie below."""
    middle = float(values[len(values) // 2])
    return BadInput(
        f"The threshold {threshold:g} leaves {'every' if threshold > middle else 'no'} direction of the keys free",
        where=where or None,
        details=[
            f"expected one between the least and the greatest eigenvalue, {float(values[0]):.3g} and"
            f" {float(values[-1]):.3g}"
        ],
        hint=f"a `threshold` of {middle:.2g} leaves half of them free here",
    )
