"""Models inside a wrapper of another library: the network itself, its weights, and the adapters active on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from kpatch.errors import BadInput
from kpatch.models.model import Model
from kpatch.patch.delta import Delta, Dense, inner
from kpatch.patch.weight_names import WeightNames

_SAME = 0.9  # cosine above which an adapter is the patch itself: rounded to bfloat16, or cut to a lower rank


def network(model: object) -> nn.Module:
    """The network of a `Model`, or inside the wrappers of PEFT, torch.compile and data parallelism.

    Raises BadInput for anything that is no network, such as the path of one.
    """
    net: Any = model.net if isinstance(model, Model) else model
    while isinstance(net, nn.Module):
        kind: Any = type(net)
        if "_orig_mod" in net._modules:  # torch.compile
            net = net._modules["_orig_mod"]
        elif isinstance(net, nn.parallel.DistributedDataParallel | nn.DataParallel):
            net = net.module
        elif hasattr(net, "peft_config") and hasattr(kind, "get_base_model"):
            net = kind.get_base_model(net)
        elif hasattr(net, "peft_config") and isinstance(inside := _mixed(net), nn.Module):
            net = inside
        else:
            return net
    raise BadInput(
        f"Expected a model in memory, found {_described(model)}",
        hint="load it first: AutoModelForCausalLM.from_pretrained(…), or kpatch.models.model.open_model(…)",
    )


def parameter(net: nn.Module, name: str) -> nn.Parameter | None:
    """The weight that a checkpoint calls `name`, below a layer that PEFT put around it; None where there is none."""
    module = holder(net, name)
    return None if module is None else module._parameters.get(name.rpartition(".")[2])


def holder(net: nn.Module, name: str) -> nn.Module | None:
    """The module that has the weight that a checkpoint calls `name`; None where there is none.

    Where an adapter keeps a copy of a module (`modules_to_save`), it is the original one.
    """
    module = _outermost(net, name)
    while module is not None and isinstance(inside := module._modules.get("base_layer"), nn.Module):
        module = inside
    return module


def name_in(net: nn.Module, name: str) -> str | None:
    """What the network calls the weight that a checkpoint calls `name`: a wrapper may have it under another prefix."""
    path, _, last = name.rpartition(".")
    if _below(net, path) is None:
        found = WeightNames(name for name, _ in net.named_modules()).find(path)
        return None if found is None else f"{found}.{last}"
    return name


def _outermost(net: nn.Module, name: str) -> nn.Module | None:
    """The module of a weight, or the layer that PEFT put around it."""
    here = name_in(net, name)
    found = None if here is None else _below(net, here.rpartition(".")[0])
    return None if found is None else found[-1]


def _below(net: nn.Module, path: str) -> list[nn.Module] | None:
    """The modules on the way from the network to `path`, with those that keep copies; None where it leads nowhere.

    By attributes, a module that keeps copies would answer with the copy of the adapter that is active just now.
    """
    way: list[nn.Module] = [net]
    for part in path.split(".") if path else ():
        module = way[-1]._modules.get(part)
        if module is None:
            return None
        way.append(module)
        while isinstance(original := way[-1]._modules.get("original_module"), nn.Module):
            way.append(original)
    return way


def copy_in_use(net: nn.Module, name: str) -> str | None:
    """The name of an adapter that runs a copy of its own (`modules_to_save`) in place of this weight's module."""
    here = name_in(net, name)
    way: list[Any] = (here and _below(net, here.rpartition(".")[0])) or []
    for module in way:
        copies = module._modules.get("modules_to_save")
        if "original_module" in module._modules and copies is not None and not module.disable_adapters:
            for adapter in module.active_adapters:
                if adapter in copies:
                    return str(adapter)
    return None


@torch.no_grad()
def active_adapter(net: nn.Module, deltas: Mapping[str, Delta]) -> str | None:
    """The name of a LoRA adapter that is active on the network and makes the same change as `deltas`, if there is one.

    Its change and that of the patch are compared by the cosine between them, over all weights of the patch.
    """
    products: dict[str, float] = {}
    squares: dict[str, float] = {}
    for name, delta in deltas.items():
        layer: Any = adapted(net, name)
        if layer is None or getattr(layer, "disable_adapters", False):
            continue
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                change = Dense(layer.get_delta_weight(adapter).float().cpu())
                if change.shape == delta.shape:
                    products[adapter] = products.get(adapter, 0.0) + inner(change, delta)
                    squares[adapter] = squares.get(adapter, 0.0) + change.norm() ** 2
    whole = sum(delta.norm() ** 2 for delta in deltas.values())
    for adapter, product in products.items():
        if product > _SAME * (squares[adapter] * whole) ** 0.5 > 0:
            return adapter
    return None


def adapted(net: nn.Module, name: str) -> nn.Module | None:
    """The layer that PEFT put around a weight; None where there is none."""
    module = _outermost(net, name)
    known = all(hasattr(module, part) for part in ("lora_A", "active_adapters", "get_delta_weight"))
    return module if known else None


def merged_adapter(net: nn.Module, names: Iterable[str]) -> str | None:
    """The name of an adapter that PEFT has merged into one of these weights; None where there is none."""
    layers: list[Any] = [adapted(net, name) for name in names]
    return next((str(one) for layer in layers for one in getattr(layer, "merged_adapters", ())), None)


def _mixed(net: nn.Module) -> object:
    """The network inside PEFT's model of mixed adapters, which has no function that gives it."""
    tuner = net._modules.get("base_model")
    return None if tuner is None else tuner._modules.get("model")


def _described(value: object) -> str:
    kind = type(value).__name__
    return f"the {kind} {value!r}" if isinstance(value, str) else f"a value of type {kind}"
