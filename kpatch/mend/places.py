"""Which matrices an editor changes: the input and output projections of the MLPs of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
            if name != last and _reads_the_stream(module, model.width):
                found.append(_place(f"{around}.{name}.weight", layer, module))
        found.append(_place(down, layer, model.down(layer)))
    return tuple(found)


def module_of(model: Model, place: Place) -> nn.Module:
    module: nn.Module = model.net.get_submodule(place.module)
    return module


def _stored_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2's own: the only one that multiplies from the other side


def _reads_the_stream(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    linear = isinstance(module, nn.Linear) or _stored_transposed(module)
    return linear and isinstance(weight, Tensor) and weight.shape[0 if _stored_transposed(module) else 1] == width


def _place(name: str, layer: int, module: nn.Module) -> Place:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows, cols = weight.shape
    turned = _stored_transposed(module)
    return Place(name, layer, *((rows, cols) if turned else (cols, rows)), turned)
