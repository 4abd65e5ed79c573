"""How what W^l puts out joins the residual stream, measured from the layer's own code: its scale, and its norm."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kpatch.errors import BadInput
from kpatch.models.families import has_experts

if TYPE_CHECKING:
    from kpatch.models.model import Model

# Large, so that anything else that the layer adds does not count; a power of two, so that it is exact.
_SIZE = 1024.0


@torch.no_grad()
def measured_scale(model: Model, index: int) -> float | None:
    """s, where what is written joins the residual stream as s times that; None where s differs from token to token.

    Written is what W^l puts out, or what the norm behind it does. Measured as what leaves the layer where attention
    gives 0, a known vector is written, and nothing came before. A gate on a shared expert makes s a function of the
    token; it shows when something came before. Raises BadInput where the vector does not join the stream at all.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (model.width,), generator=generator) * 2 - 1
    written = (_SIZE * signs).to(model.device, model.dtype)
    before = torch.randn(2, 1, 1, model.width, generator=generator).to(model.device, model.dtype)
    place = model.mlp_out(index) if model.family.post_norm else model.down(index)
    found: list[float] = []
    elsewhere: list[float] = []

    def run(layer: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if layer != index:
            return hidden

        def leaving(state: Tensor, vector: Tensor) -> Tensor:
            with ExitStack() as stack:
                for module, value in ((model.attn_out(index), torch.zeros_like(vector)), (place, vector)):
                    stack.callback(module.register_forward_hook(_puts_out(value)).remove)
                out = inner(state, *args, **kwargs)
            return (out[0] if isinstance(out, (tuple, list)) else out).to(state.device).double()  # type: ignore[no-any-return]

        out = leaving(torch.zeros_like(hidden), written)
        scale = float((out * written).mean() / _SIZE**2)
        if not (out - scale * written).norm() < 0.1 * out.norm():
            raise BadInput(
                f"Layer {index} of {model.name} does not add its MLP's output to the residual stream",
                details=["the equations of the methods hold only where it does"],
            )
        found.append(scale)
        if has_experts(model.config):  # one of them may be gated
            for state in before:
                twice = leaving(state, written) - leaving(state, -written)
                elsewhere.append(float((twice * written).mean() / (2 * _SIZE**2)))
        return hidden

    inner = model.layer(index).forward
    with model.layers_replaced(run):
        model.net(input_ids=torch.full((1, 1), model.pad_id, device=model.device), use_cache=False)
    gated = any(abs(other - found[0]) > 0.02 * abs(found[0]) for other in elsewhere)  # float16 rounds to 0.001
    return None if gated else found[0]


@torch.no_grad()
def require_own_norm(model: Model, index: int) -> None:
    """Refuse a layer whose norm behind W^l norms something else too, so that it cannot be undone for W^l alone.

    Raises BadInput. A layer without such a norm passes.
    """
    if not model.family.post_norm:
        return
    put_out: list[Tensor] = []
    normed: list[Tensor] = []
    with ExitStack() as stack:
        down = model.down(index).register_forward_hook(lambda module, inputs, out: put_out.append(out.clone()))
        norm = model.mlp_out(index).register_forward_pre_hook(lambda module, inputs: normed.append(inputs[0].clone()))
        stack.callback(down.remove)
        stack.callback(norm.remove)
        model.net(input_ids=torch.full((1, 1), model.pad_id, device=model.device), use_cache=False)
    if not torch.equal(put_out[0].flatten(), normed[0].flatten()):
        raise BadInput(
            f"Layer {index} of {model.name} norms its MLP's output together with that of its experts",
            details=["this method undoes that norm, and needs it to hold the MLP's output alone"],
            hint="`method` memit finds its writes with the norm in place",
        )


def _puts_out(value: Tensor) -> Any:
    def hook(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        return value.to(out.device).expand_as(out).clone()  # Llama 4 adds to it in place

    return hook
