"""Products of linear layers in bfloat16 while the rest stays float32, for processors that multiply bfloat16 faster.

Both factors of a product are rounded to 8 significant bits, by 0.4 % at most and to either side, and its sum is
taken in float32. The residual stream, norms, attention and probabilities are float32 as before. Searching for values,
sampling text, the keys of the covariance and tracing stand this; what a user is told of a model does not use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kpatch.memory import all_memory

if TYPE_CHECKING:
    from kpatch.models.model import Model

MIXED = "mixed"  # what this is called where a dtype is named
_LINEAR = ("FalconLinear",)  # linear layers by another name
_WORTH_IT = 2**18  # numbers in a W^l: smaller products gain nothing
_ROOM = 0.7  # of the machine's memory that weights and their copy may take


def mixes(model: Model, dtype: str, device: torch.device) -> bool:
    """Whether the model of `load_model(dtype=…)` is `mixed` on a device: as told, and by auto where that pays."""
    return dtype == MIXED or (dtype == "auto" and _pays(model, device))


def _pays(model: Model, device: torch.device) -> bool:
    """True where the processor has units for bfloat16, and the products of a float32 model are large enough for them.

    And where the machine has room for the copy: what a model is computed in must not depend on what else runs.
    """
    if device.type != "cpu" or model.dtype != torch.float32 or model.width * model.mlp_width < _WORTH_IT:
        return False
    room = all_memory()
    return has_units() and (room is None or sum(one.nbytes for one in model.net.parameters()) * 1.5 < _ROOM * room)


def has_units() -> bool:
    """True where the processor multiplies bfloat16 by itself (AVX512-BF16 or AMX)."""
    units = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(units.get("avx512_bf16") or units.get("amx_bf16"))


@contextmanager
def mixed_precision(model: Model) -> Iterator[None]:
    """While open, linear layers and the head of a `mixed` model multiply in bfloat16; other models stay as they are.

    Weights must not change meanwhile: a copy of them is used, two bytes a number. Layers whose forward is another's
    (accelerate's, or that of an outer `mixed_precision`) and weights that are not float32 or have a gradient run as
    they are.
    """
    changed: list[nn.Module] = []
    try:
        if model.mixed:
            last = _LastInput()
            # Not those of a wrapper's vision part, which never runs
            for module in (*model.layers.modules(), model.net.get_output_embeddings()):
                if _fits(module):
                    module.forward = _forward(module, last)
                    changed.append(module)
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


def _fits(module: nn.Module) -> bool:
    if type(module) not in (nn.Linear, Conv1D) and type(module).__name__ not in _LINEAR:
        return False  # a layer that does more than multiply
    if "forward" in module.__dict__:
        return False
    weight = module.weight
    return weight.dtype == torch.float32 and not weight.is_meta and not weight.requires_grad


class _LastInput:
    """The last input in bfloat16: queries, keys and values, or gate and up, come from the same one."""

    def __init__(self) -> None:
        self.given: Tensor | None = None
        self.version = 0
        self.rounded: Tensor | None = None

    def round(self, x: Tensor) -> Tensor:
        if x is not self.given or x._version != self.version or self.rounded is None:
            self.given, self.version, self.rounded = x, x._version, x.detach().bfloat16()
        return self.rounded


class _Product(torch.autograd.Function):
    """x W^T [..., o] for x [..., i] and W [o, i]; a gradient for x, which needs W alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, last: _LastInput) -> Tensor:
        ctx.weight = weight
        return nn.functional.linear(last.round(x), weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (grad.bfloat16() @ ctx.weight).to(grad.dtype), None, None


def _forward(module: Any, last: _LastInput) -> Callable[[Tensor], Tensor]:
    weight = module.weight.detach().bfloat16()
    if isinstance(module, Conv1D):  # GPT-2 stores [in, out]
        weight = weight.t().contiguous()
    bias = module.bias

    def forward(x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x, weight, last)  # type: ignore[no-untyped-call]
        return out if bias is None else out + bias

    return forward
