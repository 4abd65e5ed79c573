"""Writing through the layers of R, the lowest first: each layer is asked for what is missing under the weights so far.

Which residual a layer is asked for is the method's own. Source: Meng et al. 2023 (MEMIT), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from kpatch import distributed
from kpatch.edit.held import Rows, Standing
from kpatch.edit.keys import Keys
from kpatch.edit.layer_states import LayerStates
from kpatch.edit.requests import Group
from kpatch.edit.solve import KeyCovariance, update, update_apart
from kpatch.edit.weights import add, restored, stored
from kpatch.models.model import Model
from kpatch.patch.delta import Delta, smaller
from kpatch.reporter import SILENT, Reporter

Residual = Callable[[int, Tensor, Tensor], Tensor]


@dataclass
class Update:
    """Deltas by weight name, in the orientation in which W is stored, and the mean keys [n, f] of each layer.

    `by_row` names the weights whose delta has a column and a row for each group: see `Edit`. `moved` [m, d] by layer
    are the targets of held rows that are asked for them again: their keys stand behind those of the groups.
    """

    deltas: dict[str, Delta] = field(default_factory=dict)
    by_row: set[str] = field(default_factory=set)
    keys: dict[int, Tensor] = field(default_factory=dict)
    moved: dict[int, Tensor] = field(default_factory=dict)


def write_upwards(
    model: Model,
    groups: Sequence[Group],
    layers: Sequence[int],
    residual: Residual,
    preserved: Callable[[int], KeyCovariance],
    *,
    top: int | None = None,
    apart: bool = False,
    budget: int,
    least_leverage: float = 0.0,
    held: Standing | None = None,
    report: Reporter = SILENT,
) -> Update:
    """Deltas for every layer of R; the model is left as it was found.

    For l in R ascending: mean keys K^l [n, f] and states h [n, d] of the bare prompts under the weights so far, h
    leaving layer `top` (l itself where it is None); `residual(l, K, h)` [n, d] float64 is what W^l is asked to put out
    more; Δ^l from `solve.update`, or `solve.update_apart` where each row's key is kept `apart`; then W^l changes
    before the next layer is looked at.
    A key whose leverage q = k^T C^{-1} k is below `least_leverage` counts least_leverage / q times: alone it would
    get no more than q / (1 + q) of its residual.
    `preserved(l)` is C^l, asked for when it is needed: a wide layer's fills memory. `held` are earlier patches: their
    facts' keys join it, and residuals are those of the base less what the patches give. Ranks share what is run
    through the model; rank 0 solves, and alone asks.
    """
    layers = sorted(layers)
    result = Update()
    names = [model.weight_name(layer) for layer in layers]
    with restored(model, names), report.task("Updating layers", len(layers), "layer") as done:
        states = LayerStates(model, groups, budget)
        if held is not None:
            held.held.take_off(layers)
        states.start(layers[0])
        for layer, name, above in zip(layers, names, [*layers[1:], layers[-1]], strict=True):
            keys, h = states.at(layer, layer if top is None else top)  # h (n, d)
            wanted = residual(layer, keys.means, h)  # (n, d)
            earlier = None
            if held is not None:
                wanted = wanted.double() - held.held.wrote(layer, keys.means)
                held.held.put_back([one for one in layers if one >= layer])
                earlier = held.rows(layer)
                held.held.take_off([one for one in layers if one > layer])
            delta, by_row, again = distributed.main_does(
                partial(_delta, model, layer, keys, wanted, preserved, least_leverage, apart, earlier)
            )
            result.deltas[name] = delta
            if by_row:
                result.by_row.add(name)
            result.keys[layer] = keys.means if again is None else torch.cat([keys.means, again.keys.means])
            if again is not None:
                result.moved[layer] = again.targets.float()
            add(model, name, delta)
            states.advance(layer, above)
            done(1)
    return result


def _delta(
    model: Model,
    layer: int,
    keys: Keys,
    residual: Tensor,
    preserved: Callable[[int], KeyCovariance],
    least_leverage: float,
    apart: bool,
    held: Rows | None,
) -> tuple[Delta, bool, Rows | None]:
    """Δ^l for the groups' keys and residuals [n, d], whether it has a column and a row for each group, and the held
    rows that have them too."""
    c, again = preserved(layer), None
    if held is not None:
        room = min(model.width, len(c.factor) - 1) - len(residual)
        moved = held.moved(room if room >= 0 else None)
        weights = _scale(c.leverage(held.keys.means.T), least_leverage)
        c = c.with_keys(held.some(~moved).columns(weights[~moved], apart))
        if bool(moved.any()):
            again = held.some(moved)
            keys, residual = keys.joined(again.keys), torch.cat([residual, again.lacking])
    scale = _scale(c.leverage(keys.means.T), least_leverage)  # (n, 1)
    wanted = (residual * scale).T
    if apart:
        left, right = update_apart(keys.scaled(scale), wanted, c)
    else:
        left, right = update((keys.means * scale).T, wanted, c)
    if len(residual) > len(left) or len(residual) >= len(c.factor):  # more than Δ's rank, or solved f × f
        return smaller(stored(left, right, model.stores_transposed)), False, again
    # The residual itself, so that with the mean key beside it another patch's update can be taken into account. Worth
    # the factors also where Δ alone would take fewer numbers.
    return stored(left / scale.T, right * scale, model.stores_transposed, balanced=False), True, again


def _scale(leverage: Tensor, least: float) -> Tensor:
    """Square roots [n, 1] of the facts' weights in the least-squares problem; leverage [n]."""
    return (least / leverage.clamp(min=1e-12)).clamp(min=1.0).sqrt()[:, None]
