"""Weights that are in memory only while their module runs: read, held for a while, and found again for a gradient.

accelerate spreads a network over devices: a hook on each module brings its inputs to its device, and where the module
is offloaded it loads the weights before the forward pass and drops them after it. In between they are on `meta` and
have a shape but no numbers. Nothing here imports accelerate: a network without its hooks passes through unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kpatch.errors import Refused

_HOLDS = "_kpatch_holds"  # on a hook: how many holders its module has


def main_device(net: Any) -> torch.device:
    """Where ids go in and logits come out: the device that the embedding runs on."""
    embedding = net.get_input_embeddings()
    for hook in _hooks(embedding):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    device: torch.device = next((embedding if embedding is not None else net).parameters()).device
    return device


def read(net: nn.Module, name: str) -> Tensor:
    """The numbers of a parameter or buffer, loaded where it is offloaded. Not to be changed: see `held`."""
    path, _, last = name.rpartition(".")
    module = net.get_submodule(path)
    tensor = module._parameters.get(last, module._buffers.get(last))
    if tensor is None:
        raise AttributeError(f"the network has no {name}")
    if not tensor.is_meta:
        return tensor.detach()
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):  # the hook may be on a module around it
        hook = _offloading(net.get_submodule(".".join(parts[:depth])))
        if hook is not None:
            found: Tensor = hook.weights_map[".".join(parts[depth:])]
            return found.detach().to(tensor.dtype)
    raise AttributeError(f"{name} has no values, and nothing loads them")


def can_hold(module: nn.Module) -> bool:
    """Whether `held` can bring the weights of a module into memory."""
    hook = _offloading(module, held=True)
    return hook is not None and not getattr(hook, "place_submodules", False)


@contextmanager
def held(modules: Sequence[nn.Module]) -> Iterator[None]:
    """While open, the weights of `modules` are in memory on the device where they run, and may be changed.

    What is changed is lost at the end, when the last holder of a module lets go. A module that is not offloaded is
    left as it is. Raises Refused for one whose weights are loaded by a module around it.
    """
    with ExitStack() as stack:
        for module in modules:
            hook = _offloading(module, held=True)
            if hook is None and any(one.is_meta for one in module.parameters(recurse=False)):
                raise Refused(
                    f"The weights of a {type(module).__name__} are not in memory",
                    hint="load the model with kpatch, or without offloading",
                )
            if hook is not None:
                stack.callback(_release, module, hook)
                _hold(module, hook)
        yield


def in_memory(net: nn.Module, names: Iterable[str]) -> AbstractContextManager[None]:
    """`held` for the modules of named weights."""
    return held([net.get_submodule(name.rpartition(".")[0]) for name in names])


@torch.no_grad()
def _hold(module: nn.Module, hook: Any) -> None:
    holds = getattr(hook, _HOLDS, 0)
    setattr(hook, _HOLDS, holds + 1)
    if holds:
        return
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:
            # a copy: the map may answer with the file itself, or with what the CPU keeps
            value = hook.weights_map[name].to(hook.execution_device, parameter.dtype, copy=True)
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
    hook.offload = False  # the forward pass neither loads nor drops them


def _release(module: nn.Module, hook: Any) -> None:
    setattr(hook, _HOLDS, getattr(hook, _HOLDS) - 1)
    if getattr(hook, _HOLDS):
        return
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:
            module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    hook.offload = True


def prepare(net: nn.Module) -> None:
    """Make a network that was spread fit for searches: call it once, when it is loaded.

    Gradients pass through offloaded modules without keeping their weights in memory until then. Autograd keeps what
    the backward pass needs, and for a linear layer that is its weight: all offloaded layers would be in memory
    together. What it keeps of an offloaded module is a note instead, and the weight is loaded again.
    Convolutions over a few tokens (LFM2, Qwen 3.5) stay in memory: the module around them takes their weights and
    never runs them.
    """
    for module in net.modules():
        hook = _offloading(module)
        if hook is not None and isinstance(module, nn.Conv1d):
            _hold(module, hook)
            continue
        if hook is not None and not getattr(hook, "place_submodules", False):
            module.forward = _noting(module, hook, module.forward)


def _noting(module: nn.Module, hook: Any, inner: Callable[..., Any]) -> Callable[..., Any]:
    def pack(tensor: Tensor) -> Any:
        storage = tensor.untyped_storage().data_ptr()
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta and parameter.untyped_storage().data_ptr() == storage:
                return name, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()
        return tensor

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        name, dtype, *view = kept
        whole: Tensor = hook.weights_map[name].to(hook.execution_device, dtype)
        return whole.as_strided(*view)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not hook.offload:
            return inner(*args, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return inner(*args, **kwargs)

    return forward


def _hooks(module: nn.Module | None) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [one for one in getattr(hook, "hooks", (hook,)) if one is not None]


def _offloading(module: nn.Module, held: bool = False) -> Any:
    """The hook that loads a module's weights from a map; None where there is none. With `held`, one on hold too."""
    for hook in _hooks(module):
        active = getattr(hook, "offload", False) or (held and getattr(hook, _HOLDS, 0))
        if active and getattr(hook, "weights_map", None) is not None:
            return hook
    return None
