"""Modules of the shapes that PEFT gives those it wraps, without PEFT."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from kpatch.patch.delta import LowRank


class Lora(nn.Module):
    """A linear layer with adapters around it, of the shape that PEFT gives one."""

    def __init__(self, base: nn.Module, change: LowRank) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"news": nn.Linear(change.right.shape[1], change.rank, bias=False)})
        self.lora_B = nn.ModuleDict({"news": nn.Linear(change.rank, change.left.shape[0], bias=False)})
        self.lora_A["news"].weight.data, self.lora_B["news"].weight.data = change.right, change.left / 2
        self.scaling = {"news": 2.0}
        self.active_adapters = ["news"]
        self.disable_adapters = False
        self.merged_adapters: list[str] = []

    @property
    def weight(self) -> nn.Parameter:
        weight: nn.Parameter = self.base_layer.weight
        return weight

    @torch.no_grad()
    def merge(self, adapter_names: list[str] | None = None) -> None:
        for name in adapter_names or self.active_adapters:
            self.weight.data += self.get_delta_weight(name)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        while self.merged_adapters:
            self.weight.data -= self.get_delta_weight(self.merged_adapters.pop())

    def get_delta_weight(self, name: str) -> Tensor:
        delta: Tensor = self.lora_B[name].weight @ self.lora_A[name].weight * self.scaling[name]
        return delta


class Mixed(nn.Module):
    """A network inside two layers of wrapper, as PEFT's model of mixed adapters has it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.peft_config = {"news": None}
        self.base_model = nn.Module()
        self.base_model.model = net


class Peft(Mixed):
    """The usual wrapper, which also tells what is inside."""

    def get_base_model(self) -> nn.Module:
        return self.base_model.model


class Copied(nn.Module):
    """A module of which an adapter keeps a copy of its own (modules_to_save); attributes are those of what runs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({"news": deepcopy(module)})
        self.active_adapters = ["news"]
        self.disable_adapters = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            runs = self.original_module if self.disable_adapters else self.modules_to_save["news"]
            return getattr(runs, name)
