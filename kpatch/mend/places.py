"""Which matrices an editor changes: the input and output projections of the MLPs of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from kpatch.models.model import Model
from kpatch.models.module_names import require_places

DEFAULT_LAYERS = 3  # the last ones, as in the paper


@dataclass(frozen=True)
class Place:
    """One linear module: the name of its weight, its layer, and whether the weight is stored [in, out]."""

    name: str
    layer: int
    width_in: int
    width_out: int
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(in, out): places of one shape share a network."""
        return self.width_in, self.width_out

    @property
    def module(self) -> str:
        """The name of the module."""
        return self.name.removesuffix(".weight")


def last_layers(model: Model, count: int = DEFAULT_LAYERS) -> tuple[int, ...]:
    """The last `count` layers that have an MLP to write to."""
    return model.editable[-count:]


def places(model: Model, layers: Sequence[int]) -> tuple[Place, ...]:
    """The projections of the MLPs of `layers`, rising, as they run: those that read the residual stream, then W^l.

    What reads the residual stream stands beside W^l in the same module (one matrix, or a gate too), so that no family
    needs names for it. Raises BadInput for layers that the model lacks.
    """
    require_places(model, layers)
    found = []
    for layer in sorted(set(layers)):
        down = model.weight_name(layer)
        around, _, last = down.removesuffix(".weight").rpartition(".")
        for name, module in model.net.get_submodule(around).named_children():
            if name != last and isinstance(module, nn.Linear | Conv1D):
                place = _place(model, f"{around}.{name}.weight", layer)
                if place.width_in == model.width:
                    found.append(place)
        found.append(_place(model, down, layer))
    return tuple(found)


def module_of(model: Model, place: Place) -> nn.Module:
    module: nn.Module = model.net.get_submodule(place.module)
    return module


def _place(model: Model, name: str, layer: int) -> Place:
    """A family stores both projections of an MLP in the same orientation."""
    rows, cols = model.net.get_parameter(name).shape
    turned = model.stores_transposed
    return Place(name, layer, *((rows, cols) if turned else (cols, rows)), turned)
