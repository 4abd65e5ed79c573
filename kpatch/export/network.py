"""The network of an adapter's base, from its config.json: what modules are called, and which class loads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kpatch.errors import Refused
from kpatch.models.complete import read_config
from kpatch.models.placement import meta_network
from kpatch.models.quiet import quiet_transformers
from kpatch.patch.header import PatchInfo
from kpatch.patch.weight_names import WeightNames
from kpatch.text import printable


@dataclass(frozen=True)
class BaseNetwork:
    """A checkpoint's network: `modules` are its names, `kind` is its class in the Python module `library`.

    `causal` is true where AutoModelForCausalLM gives this class; of a model with vision it may load the text alone.
    """

    name: str
    modules: frozenset[str]
    kind: str
    library: str
    causal: bool


def base_network(directory: Path) -> BaseNetwork | None:
    """The network that a checkpoint's config.json describes; None where transformers does not build it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        with quiet_transformers():
            config = read_config(str(directory), str(directory))
            net = meta_network(config, torch.float32)
    except Exception:  # code of its own, which PEFT may be told to run: whatever building it without that ends in
        return None
    kind: Any = type(net)
    known = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else None
    modules = frozenset(name for name, _ in net.named_modules())
    return BaseNetwork(str(directory), modules, kind.__name__, kind.__module__, known is kind)


def modules_in(network: BaseNetwork, info: PatchInfo) -> dict[str, str]:
    """The module of the network that each weight of a patch belongs to, by the weight's name in the patch.

    A patch of a text model names a wrapper's modules so, and the other way round. Raises Refused for a weight that
    the network has under no name.
    """
    here = WeightNames(network.modules)
    found = {weight: here.find(weight.rpartition(".")[0]) for weight in info.manifest.deltas}
    missing = sorted(weight for weight, module in found.items() if module is None)
    if missing:
        raise Refused(
            f"{network.name} has no module for what {info.name} changes: its {network.kind} is another model",
            details=[printable(weight, 120) for weight in missing[:10]],
            hint="`kpatch show` names the base a patch was made for",
        )
    return {weight: module for weight, module in found.items() if module is not None}
