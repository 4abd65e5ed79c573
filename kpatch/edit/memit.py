"""The MEMIT update: spread each fact's residual over the layers R, one layer after the other.

Source: Meng et al. 2023 (MEMIT), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from kpatch import distributed
from kpatch.edit.hyper import Hyper
from kpatch.edit.layer_states import States
from kpatch.edit.requests import Group
from kpatch.edit.solve import Preserved, pull_back, update
from kpatch.models.model import Model
from kpatch.patch.delta import Dense, LowRank, smaller
from kpatch.reporter import SILENT, Reporter


@dataclass
class Update:
    """Deltas by weight name, in the orientation in which W is stored, and the keys [n, f] of each layer."""

    deltas: dict[str, LowRank | Dense] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)


def spread(
    model: Model,
    groups: Sequence[Group],
    z: Tensor,
    preserved: dict[int, Preserved],
    hyper: Hyper,
    *,
    budget: int,
    least_leverage: float = 0.0,
    report: Reporter = SILENT,
) -> Update:
    """Deltas for every layer of R that carry the groups' values z [n, d]; the model is left as it was found.

    For l in R ascending: K^l under the weights so far, r = (z − h^L) / (L − l + 1), Δ^l from `solve.update`,
    then W^l changes before the next layer is looked at. A key whose leverage q = k^T C^{-1} k is below
    `least_leverage` counts least_leverage / q times: alone it would get no more than q / (1 + q) of its residual.
    Ranks share what is run through the model; rank 0, which alone needs `preserved`, solves.
    """
    layers = sorted(hyper.layers)
    last = layers[-1]
    result = Update()
    with restored(model, layers), report.task("Updating layers", len(layers), "layer") as done:
        states = States(model, groups, budget)
        states.start(layers[0])
        for layer, above in zip(layers, [*layers[1:], last], strict=True):
            keys, h = states.at(layer, last)  # (n, f), (n, d)
            residual = (z.double() - h.double()) / (last - layer + 1)  # (n, d)
            residual = residual / model.residual_scale(layer)  # what W^l writes joins the stream times this
            if model.family.post_norm:
                residual = _before_norm(model, layer, keys, residual)
            delta = distributed.main_does(partial(_delta, model, layer, keys, residual, preserved, least_leverage))
            result.deltas[model.weight_name(layer)] = delta
            result.keys[layer] = keys
            add(model, layer, delta)
            states.advance(layer, above)
            done(1)
    return result


def _delta(
    model: Model, layer: int, keys: Tensor, residual: Tensor, preserved: dict[int, Preserved], least_leverage: float
) -> LowRank | Dense:
    """Δ^l for keys [n, f] and residuals [n, d]."""
    scale = _scale(preserved[layer].leverage(keys.T), least_leverage)  # (n, 1)
    left, right = update((keys * scale).T, (residual * scale).T, preserved[layer])
    return smaller(stored(left, right, model.stores_transposed))


def _scale(leverage: Tensor, least: float) -> Tensor:
    """Square roots [n, 1] of the facts' weights in the least-squares problem; leverage [n]."""
    return (least / leverage.clamp(min=1e-12)).clamp(min=1.0).sqrt()[:, None]


def stored(left: Tensor, right: Tensor, transposed: bool) -> LowRank:
    """Float32 factors in W's stored orientation, of equal column and row norms so that neither underflows."""
    a, b = left.norm(dim=0).clamp(min=1e-30), right.norm(dim=1).clamp(min=1e-30)
    left, right = left * (b / a).sqrt(), right * (a / b).sqrt()[:, None]
    if transposed:
        left, right = right.T, left.T
    return LowRank(left.float().contiguous(), right.float().contiguous())


def _before_norm(model: Model, layer: int, keys: Tensor, residual: Tensor) -> Tensor:
    """The residual pulled back through the norm between W^l and the residual stream, [n, d]."""
    norm = model.mlp_out(layer)
    device = model.device
    written = model.down(layer)(keys.to(device, model.dtype)).float()  # (n, d)
    gain, eps = norm_gain(norm, model.width, device)
    return pull_back(written.cpu(), residual, gain.cpu(), eps)


def norm_gain(norm: torch.nn.Module, width: int, device: torch.device) -> tuple[Tensor, float]:
    """The factor γ [d] that an RMS norm applies, whatever its parametrization (Gemma stores γ − 1), and its ε."""
    eps = float(getattr(norm, "eps", getattr(norm, "variance_epsilon", 1e-6)))
    ones = torch.ones(1, width, device=device, dtype=next(norm.parameters()).dtype)
    gain: Tensor = norm(ones)[0].float() * (1 + eps) ** 0.5
    return gain, eps


@torch.no_grad()
def add(model: Model, layer: int, delta: LowRank | Dense) -> None:
    """W^l + Δ in memory as `apply` writes it: added in float64, rounded once."""
    weight = model.weight(layer)
    weight.copy_((weight.double() + delta.dense(torch.float64).to(weight.device)).to(weight.dtype))


@contextmanager
def restored(model: Model, layers: Sequence[int]) -> Iterator[None]:
    """Whatever happens inside, the weights of `layers` come back bit for bit."""
    base = {layer: model.weight(layer).detach().clone() for layer in layers}
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, weight in base.items():
                model.weight(layer).copy_(weight)
