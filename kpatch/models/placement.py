"""Where the weights of a network go: one device, or several of them, the memory and the disk.

A network that one device holds is put there. A larger one is spread by accelerate: what is outside the layers comes
first, since every run needs it, then the layers from the last to the first, because a search for values runs the
upper ones again and again. What no device and no memory holds stays on the disk and is read when it runs.
"""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from kpatch import distributed
from kpatch.cache import cache_dir
from kpatch.errors import BadInput
from kpatch.memory import free_memory
from kpatch.models.families import Family
from kpatch.models.mixed_precision import MIXED
from kpatch.models.text_part import find_layers, loader
from kpatch.text import format_size

_FULL = 0.9  # a device whose weights take more of its free memory than this has no room to work
_LARGEST = 4  # times the bytes of its files that a network can take: float32, of one byte a number
_SHARE = 0.75  # of the free memory of a device that weights take where they are spread and no limit is given

Limits = int | Mapping[str, int] | None


def device_named(name: str) -> torch.device:
    """The device called auto, cpu, cuda, cuda:1 …; auto is a GPU where there is one. Raises BadInput."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    local = distributed.local_rank()
    if name == "cuda" and local is not None:
        name = f"cuda:{local}"  # each process of this machine has its own
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(
            f"Device {name!r} cannot be used", details=[reason], hint="`device` cpu always works"
        ) from error
    return device


def dtype_named(name: str, device: torch.device) -> torch.dtype | str:
    """What weights are held in under the dtype called float32, mixed, bfloat16 or float16.

    auto is float32 on a CPU, the checkpoint's own elsewhere.
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    dtypes = {"float32": torch.float32, MIXED: torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    name = str(name).removeprefix("torch.")
    if name not in dtypes:
        raise BadInput(f"Unknown dtype {name!r}", details=[f"expected one of auto, {', '.join(dtypes)}"])
    return dtypes[name]


def limits_checked(limits: Limits) -> Limits:
    """`max_memory` as it was given. Raises BadInput for what is no number of bytes or no device."""
    several = limits if isinstance(limits, Mapping) else {} if limits is None else {"cpu": limits}
    for name, size in several.items():
        if type(size) is not int or size < 1 or not str(name).startswith(("cpu", "cuda")):
            raise BadInput(
                f"`max_memory` is {limits!r}",
                details=["expected a number of bytes, or one for each device: {'cuda:0': 20_000_000_000, 'cpu': …}"],
            )
    return limits


@dataclass(frozen=True)
class Sizes:
    """What the parts of a network take, in bytes: `around`, all modules outside the layers, and `layers` by name."""

    around: Mapping[str, int]
    layers: Mapping[str, int]
    tied: Mapping[str, str] = field(default_factory=dict)  # parts outside the layers that share another's weights

    @property
    def total(self) -> int:
        return sum(self.around.values()) + sum(self.layers.values())


def meta_network(config: Any, dtype: torch.dtype | str) -> Any:
    """The network of a configuration, without any numbers. dtype auto is what the configuration says."""
    own = getattr(config, "dtype", None) if dtype == "auto" else dtype
    with torch.device("meta"):
        net = loader(config).from_config(config, dtype=own if isinstance(own, torch.dtype) else torch.float32)
    net.tie_weights()
    return net


def sizes_of(net: nn.Module, family: Family) -> Sizes:
    """The parts of a network by name, each weight counted once. Raises AttributeError where there are no layers."""
    where = find_layers(net, family.layers)
    owners: dict[int, str] = {}
    around: dict[str, int] = {}
    tied: dict[str, str] = {}

    def size(module: nn.Module, name: str) -> int:
        taken = 0
        for one in module.parameters():
            if id(one) in owners:
                tied[name] = owners[id(one)]
            else:
                owners[id(one)] = name
                taken += one.numel() * one.dtype.itemsize
        return taken

    def walk(module: nn.Module, name: str) -> None:
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}" if name else child_name
            if full == where:
                continue
            if where.startswith(full + "."):
                walk(child, full)
            else:
                around[full] = size(child, full)
        for own, parameter in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            around[f"{name}.{own}" if name else own] = parameter.numel() * parameter.dtype.itemsize

    walk(net, "")
    named = [(f"{where}.{name}", layer) for name, layer in net.get_submodule(where).named_children()]
    return Sizes(around, {name: size(layer, name) for name, layer in named}, tied)


def device_map(sizes: Sizes, room: Mapping[str, int], upto: int | None = None) -> dict[str, str]:
    """A device for each part: those of `room`, by name in the order in which they are filled, else disk.

    `room` is the bytes that weights may take on each; the first is the main device, where offloaded parts run one at
    a time. Layers go from the last to the first; with `upto`, those above layer `upto` are left on the disk, as they
    are not to be run, and the others go from the first on.
    """
    names = list(sizes.layers)
    order = names[::-1] if upto is None else names[: upto + 1]
    parts = [*sizes.around.items(), *((name, sizes.layers[name]) for name in order)]
    where: dict[str, str] = dict.fromkeys((*sizes.around, *names), "disk")
    left = dict(room)
    devices = list(left)
    if sum(size for _, size in parts) > left[devices[0]]:  # something runs there that does not stay
        left[devices[0]] -= max(sizes.layers.values(), default=0)
    for name, size in parts:
        while devices and size > left[devices[0]]:
            if name in sizes.around:  # smaller ones may still fit
                break
            devices.pop(0)
        fitting = next((device for device in devices if size <= left[device]), None)
        if fitting is not None:
            where[name] = fitting
            left[fitting] -= size
    return where | {name: where[owner] for name, owner in sizes.tied.items()}


@dataclass(frozen=True)
class Spread:
    """A network's parts, and the device that each goes to."""

    sizes: Sizes
    where: Mapping[str, str]

    @property
    def taken(self) -> dict[str, int]:
        """Bytes by device."""
        found: dict[str, int] = {}
        for name, size in (*self.sizes.around.items(), *self.sizes.layers.items()):
            found[self.where[name]] = found.get(self.where[name], 0) + size
        return found

    @property
    def said(self) -> str:
        """How much lies where: `cpu 2.1 GB, disk 9.9 GB`."""
        return ", ".join(f"{device} {format_size(size)}" for device, size in self.taken.items() if size)

    def arguments(self) -> dict[str, Any]:
        """What from_pretrained is told. Weights that are stored otherwise than they are held go to the folder."""
        named = {
            name: int(on.partition(":")[2] or 0) if on.startswith("cuda") else on for name, on in self.where.items()
        }
        folder = tempfile.TemporaryDirectory(prefix="offload-", dir=cache_dir("offload"))
        atexit.register(folder.cleanup)
        return {"device_map": named, "offload_folder": folder.name}


def spread(
    config: Any,
    family: Family,
    device: torch.device,
    dtype: torch.dtype | str,
    asked: str,
    limits: Limits,
    name: str,
    upto: int | None = None,
    stored: int | None = None,
) -> Spread | None:
    """Where the parts of a network go, where it is to be spread; None where `device` holds it all.

    It is spread where `limits` say how much memory weights may take, or where it is larger than the device's free
    memory. `stored` is the size of its files: where even that many bytes in float32 fit, nothing is counted.
    Raises BadInput where spreading needs accelerate and it is not installed.
    """
    free = free_on(device)
    if limits is None and (free is None or (stored is not None and stored * _LARGEST <= _FULL * free)):
        return None
    sizes = sizes_of(meta_network(config, dtype), family)
    if limits is None and sizes.total <= _FULL * (free or 0):
        return None
    if find_spec("accelerate") is None:
        why = "`max_memory` was given" if limits is not None else f"{device} has {format_size(free or 0)} free"
        raise BadInput(
            f"Spreading {name} over devices, memory and disk needs the package accelerate",
            details=[f"its weights take {format_size(sizes.total)}; {why}"],
            hint='pip install "kpatch[large]"; or `dtype` bfloat16, which takes half of float32',
        )
    return Spread(sizes, device_map(sizes, _room(device, asked, limits), upto))


def _room(device: torch.device, asked: str, limits: Limits) -> dict[str, int]:
    """Bytes for weights by device, the main one first, memory last."""
    gpus = [str(device)] if device.type == "cuda" else []
    if device.type == "cuda" and asked == "auto" and distributed.local_rank() is None:
        gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    elif gpus == ["cuda"]:
        gpus = ["cuda:0"]
    names = [*gpus, "cpu"]
    room = {name: int(_SHARE * (free_on(torch.device(name)) or 0)) for name in names}
    if isinstance(limits, Mapping):
        unknown = sorted(set(limits) - set(names))
        if unknown:
            raise BadInput(
                f"`max_memory` names {unknown[0]}, which is not used",
                details=[f"expected some of {', '.join(names)}"],
                hint="`device` auto uses every GPU",
            )
        return room | dict(limits)
    return room if limits is None else dict.fromkeys(names, limits)


def free_on(device: torch.device) -> int | None:
    """Bytes that are free on a device; None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory() if device.type == "cpu" else None
