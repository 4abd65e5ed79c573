"""Facts of patches that the checkpoint carries already, run through the model beside the new ones and held there.

With A = C + Σ k k^T over the facts so far and B = Σ r k^T, r what each was asked for on the base, all facts solved
together give Δ = B A^-1. A patch on top of others therefore has their keys in its C, and asks for r less what they
give at its keys already: then Δ_1 + Δ_2 + … is that solution ("The Labyrinth and the Thread", 2605.26670). An earlier
fact is held by all its rows, run through the model as it is now. In the upper layers its keys move with what is
written below, and what they stand for should stay what it was: where it would not, the update is asked for the
difference too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kpatch.edit.keys import Keys
from kpatch.edit.layer_states import LayerStates
from kpatch.edit.requests import Group
from kpatch.models.model import Model
from kpatch.patch.delta import Delta, patched_weight

# An earlier fact is asked for again where a layer would lose more than this share of what earlier patches wrote there.
MOVED = 0.1


@dataclass(frozen=True)
class Rows:
    """Held rows of one layer.

    keys  of n groups, under the weights as they are   targets [n, d]  what stood there before anything was written
    lacking [n, d] float64  what W^l has to put out more for that   wrote [n]  the norm of the earlier patches' part
    """

    keys: Keys
    targets: Tensor
    lacking: Tensor
    wrote: Tensor

    def moved(self, room: int | None) -> Tensor:
        """Flags [n] of the groups that lack too much to be left so; the `room` worst where there is not more."""
        share = self.lacking.norm(dim=1) / self.wrote.clamp(min=1e-30)
        worst = share.argsort(descending=True, stable=True)[: len(share) if room is None else max(0, room)]
        flags = torch.zeros(len(share), dtype=torch.bool)
        flags[worst] = share[worst] > MOVED
        return flags

    def columns(self, scale: Tensor, apart: bool) -> Iterator[Tensor]:
        """What joins C, Σ k k^T over blocks of columns [f, p], with the square roots [n, 1] of the facts' weights."""
        if not apart:
            yield (self.keys.means * scale).T
            return
        for one in self.keys.blocks:
            yield (one.rows * (one.shares.sqrt()[:, None] * scale[one.owner])).T

    def some(self, wanted: Tensor) -> Rows:
        """The groups whose flag [n] is set."""
        return Rows(self.keys.chosen(wanted), self.targets[wanted], self.lacking[wanted], self.wrote[wanted])


class Held:
    """What earlier patches wrote to the layers that are edited now, and their facts, which stay.

    `groups` are those facts, group i in the layers `places[i]`; `base` are the weights without the patches, by name.
    """

    def __init__(
        self,
        model: Model,
        groups: Sequence[Group],
        places: Sequence[Collection[int]],
        base: Mapping[str, Tensor],
        budget: int,
    ) -> None:
        self.model, self.groups, self.budget, self.base = model, groups, budget, dict(base)
        self.now = {name: model.numbers(name).clone() for name in base}
        self.members = {
            layer: torch.tensor([layer in mine for mine in places])
            for layer in sorted({layer for mine in places for layer in mine})
        }

    @torch.no_grad()
    def wrote(self, layer: int, keys: Tensor) -> Tensor:
        """What the earlier patches have W^l put out for keys [n, f]: [n, d] float64."""
        name = self.model.weight_name(layer)
        change = (self.now[name].double() - self.base[name].double()).cpu()
        given: Tensor = keys.double() @ (change if self.model.stores_transposed else change.T)
        return given

    def take_off(self, layers: Sequence[int]) -> None:
        """Bring the layers' weights to what they would be without the earlier patches."""
        self._put(layers, self.base)

    def put_back(self, layers: Sequence[int]) -> None:
        """Bring the earlier patches back to the layers."""
        self._put(layers, self.now)

    def add(self, name: str, delta: Delta) -> None:
        """A part of the new patch is on the weight from here on."""
        for weights in (self.base, self.now):
            weights[name] = patched_weight(weights[name], [delta])

    @torch.no_grad()
    def _put(self, layers: Sequence[int], weights: Mapping[str, Tensor]) -> None:
        for name in map(self.model.weight_name, layers):
            self.model.net.get_parameter(name).copy_(weights[name])


class Standing:
    """Held facts in the layers of one part of a patch, and what stood there before anything was written.

    `top` is the layer whose state h counts, None for the layer that is written. `standing(l, keys, h)` is the target
    [n, d] that asks for nothing, of keys [n, f] and states [n, d]; `residual(l, targets, keys, h)` what W^l has to put
    out more for others.
    """

    def __init__(
        self,
        held: Held,
        layers: Sequence[int],
        top: int | None,
        standing: Callable[[int, Tensor, Tensor], Tensor],
        residual: Callable[[int, Tensor, Tensor, Tensor], Tensor],
    ) -> None:
        self.held, self.top, self.residual = held, top, residual
        self.layers = [layer for layer in layers if layer in held.members]
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.states: LayerStates | None = None
        self.at: int | None = None
        for layer in self.layers:
            keys, h = self._reach(layer)
            self.before[layer] = standing(layer, keys.means, h), held.wrote(layer, keys.means).norm(dim=1)
        self.states = self.at = None

    def rows(self, layer: int) -> Rows | None:
        """The rows that `layer` has to hold, the weights being what they are; None where there are none.

        Layers are asked for rising.
        """
        if layer not in self.layers:
            return None
        (keys, h), (targets, wrote) = self._reach(layer), self.before[layer]
        return Rows(keys, targets, self.residual(layer, targets, keys.means, h).double(), wrote)

    def _reach(self, layer: int) -> tuple[Keys, Tensor]:
        """Keys at `layer` and states of its groups, carried up from the layer before."""
        if self.states is None:
            self.states = LayerStates(self.held.model, self.held.groups, self.held.budget)
            self.states.start(layer)
        elif self.at is not None and self.at != layer:
            self.states.advance(self.at, layer)
        self.at = layer
        keys, h = self.states.at(layer, layer if self.top is None else self.top)
        members = self.held.members[layer]
        return keys.chosen(members), h[members]
