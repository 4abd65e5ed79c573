"""Causal tracing one cell at a time, straight from the paper: each a full forward with hooks, no cache, no padding.

As the authors do it, a fact's clean row and its corrupted rows go through the network's own forward together; hooks
put the clean row's vectors, or those of a first corrupted pass, where a cell wants them. Nothing of kpatch.trace is
used but the plain data of a fact.

Source: Meng et al. 2022 (ROME), section 2; Meng et al. 2023 (MEMIT), section 3 and appendix A.
Dimension letters: S samples, T tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from kpatch.models.model import Model
from kpatch.trace.cells import Traced

Spot = tuple[str, int, int]  # "state", "mlp" or "attn"; layer; token


def modules(model: Model) -> dict[tuple[str, int], nn.Module]:
    """The modules whose outputs are h^l, m^l and a^l."""
    found: dict[tuple[str, int], nn.Module] = {}
    for layer in range(model.n_layers):
        found["state", layer] = model.layer(layer)
        found["mlp", layer] = model.mlp_out(layer)
        found["attn", layer] = model.attn_out(layer)
    return found


@torch.no_grad()
def forward(
    model: Model,
    item: Traced,
    noise: Tensor,
    restore: Collection[Spot] = (),
    freeze: Collection[Spot] = (),
    frozen: dict[tuple[str, int], Tensor] | None = None,
) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
    """P[answer] of the clean row and of S corrupted ones, [1 + S], and every module's output [1 + S, T, d]."""
    rows = torch.tensor([item.ids] * (1 + len(noise)), device=model.device)
    seen: dict[tuple[str, int], Tensor] = {}

    def corrupt(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[1:, item.first : item.last + 1] += noise.to(out)
        return out

    def patch(key: tuple[str, int]) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: Any, out: Any) -> Any:
            given = out[0] if isinstance(out, tuple) else out
            value = given.clone().reshape(*rows.shape, -1)
            for site, layer, token in freeze:
                if (site, layer) == key and frozen is not None:
                    value[1:, token] = frozen[key][1:, token]
            for site, layer, token in restore:
                if (site, layer) == key:
                    value[1:, token] = value[0, token]
            seen[key] = value.clone()
            value = value.reshape(given.shape)
            return (value, *out[1:]) if isinstance(out, tuple) else value

        return hook

    handles = [model.net.get_input_embeddings().register_forward_hook(corrupt)]
    handles += [module.register_forward_hook(patch(key)) for key, module in modules(model).items()]
    try:
        logits = model.net(input_ids=rows, use_cache=False).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()
    return logits.double().softmax(-1)[:, item.answer].cpu(), seen


def clean_and_corrupted(model: Model, item: Traced, noise: Tensor) -> tuple[float, Tensor]:
    """P[answer] of the clean run, and of each sample's corrupted run [S]."""
    found, _ = forward(model, item, noise)
    return float(found[0]), found[1:]


def restored(model: Model, item: Traced, noise: Tensor, spots: Collection[Spot]) -> Tensor:
    """P[answer] of each sample [S] with `spots` restored."""
    return forward(model, item, noise, spots)[0][1:]


def state_cell(model: Model, item: Traced, noise: Tensor, layer: int, token: int) -> Tensor:
    return restored(model, item, noise, [("state", layer, token)])


def window_cell(model: Model, item: Traced, noise: Tensor, site: str, layer: int, token: int, width: int) -> Tensor:
    """A window of `width` outputs: the authors' bounds, which reach one layer further down where it is even."""
    first, end = max(0, layer - width // 2), min(model.n_layers, layer - (-width // 2))
    return restored(model, item, noise, [(site, at, token) for at in range(first, end)])


def severed_cell(model: Model, item: Traced, noise: Tensor, site: str, layer: int) -> Tensor:
    """h_S^l restored with all of one kind's outputs at S as in a first, corrupted pass."""
    _, corrupted = forward(model, item, noise)
    cut = [(site, at, item.last) for at in range(model.n_layers)]
    return forward(model, item, noise, [("state", layer, item.last)], cut, corrupted)[0][1:]
