"""Whether the module names of a family's row fit a network, and in which of its layers a fact can be written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from kpatch.errors import BadInput
from kpatch.models.families import NO_PLACE, Family, choices, has_experts
from kpatch.models.text_part import find_layers, loader, text_config
from kpatch.text import ranges

if TYPE_CHECKING:
    from kpatch.models.model import Model


def require_any_place(config: Any, family: Family, name: str) -> None:
    """Refuse a mixture of experts of which no layer has a W^l, before its weights are loaded. Raises BadInput."""
    if not has_experts(text_config(config)):
        return
    with torch.device("meta"):
        net = loader(config).from_config(config)
    try:
        layers = net.get_submodule(find_layers(net, family.layers))
    except AttributeError:
        return  # `fit_names` says which names were tried
    found = {inner for layer in layers for inner, _ in layer.named_modules()}
    if not found.intersection(choices(family.down)):
        raise BadInput(f"{name} ({family.model_type}) {NO_PLACE}")


def fit_names(model: Model) -> None:
    """Find the family's modules in the network; the model's row then says where its layers are.

    Raises BadInput where they are not found or are not what the row says.
    """
    family = model.family
    try:
        model.family = replace(family, layers=find_layers(model.net, family.layers))
        if not model.n_layers:
            raise BadInput(
                f"{model.name} has no layers, says its configuration",
                details=["expected one layer or more"],
                hint="give the config.json that belongs to the weights",
            )
        for index in range(model.n_layers):
            model.attn_out(index), model.mlp_out(index)
        if not model.editable:
            require_any_place(model.net.config, family, model.name)
        first = model.editable[0] if model.editable else 0
        _require_numbers(model, first)
        out_width = model.weight(first).shape[1 if model.stores_transposed else 0]
        model.returns_tuple  # noqa: B018  seen now, while no hook of a caller is on the network
        if out_width != model.width:
            raise AttributeError(f"{family.down} writes {out_width} numbers where the model is {model.width} wide")
        if not _multiplies_as_stored(model, first):
            raise AttributeError(f"{family.down} has its weight stored the other way round: transposed is not so")
    except (AttributeError, IndexError) as error:
        raise BadInput(
            f"The module names for family {family.model_type!r} do not fit this model",
            details=[str(error)],
            hint="give the names by hand with `modules`: layers=…,down=…,attn_out=…",
        ) from error


def _require_numbers(model: Model, layer: int) -> None:
    dtype = model.weight(layer).dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise BadInput(
            f"{model.name} holds quantized weights, which cannot be edited",
            details=[f"{model.weight_name(layer)} is {str(dtype).removeprefix('torch.')}"],
            hint="load the unquantized checkpoint",
        )


@torch.no_grad()
def _multiplies_as_stored(model: Model, layer: int) -> bool:
    """Whether W^l is applied to a key as the row's `transposed` says; the shape of a square W does not show it."""
    weight, down = model.numbers(model.weight_name(layer)), model.down(layer)
    rows, cols = weight.shape
    if rows != cols:
        return True
    key = torch.linspace(-1, 1, rows, device=weight.device, dtype=weight.dtype)[None]  # (1, f)
    written = (down(key) - down(torch.zeros_like(key))).float()  # without the bias
    straight, turned = (key @ weight.T).float(), (key @ weight).float()
    other = (written - straight).norm() > (written - turned).norm()
    return bool(other) == model.stores_transposed


def require_places(model: Model, layers: Sequence[int]) -> None:
    """Refuse layers that the model does not have, and mixtures of experts without a shared expert. Raises BadInput."""
    wrong = [layer for layer in layers if not 0 <= layer < model.n_layers]
    if wrong:
        raise BadInput(
            f"{model.name} has no layer {wrong[0]}", details=[f"expected layers from 0 to {model.n_layers - 1}"]
        )
    routed = sorted(set(layers) - set(model.editable))
    if routed:
        are = "Layer {} is a mixture" if len(routed) == 1 else "Layers {} are mixtures"
        raise BadInput(
            f"{are.format(_and(routed))} of experts without a shared expert",
            details=[f"{model.name} can be edited in layers {ranges(model.editable)}"],
            hint="give other `layers`",
        )


def _and(numbers: Sequence[int]) -> str:
    *some, last = map(str, numbers)
    return f"{', '.join(some)} and {last}" if some else last
