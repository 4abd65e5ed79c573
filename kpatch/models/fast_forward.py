"""Attention for a few new columns over a long cached prefix, as values and tracing need it.

Library kernels are made for long queries: with five of them over cached columns they copy every key-value head once
per query head and spend a fifth of an optimization step. Queries of the heads that share keys are rows of one product.

MLPs over the tokens that count: padding, and outputs nobody reads, are left out of three quarters of the work.

An MLP treats each token by itself, so running it on chosen tokens and putting the results back is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from kpatch.models.families import choices
from kpatch.models.model import Model

_NAME = "kpatch_few_columns"


def few_columns(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling · q k^T + mask) v with grouped heads: query [B, H, S, D], key and value [B, K, T, D], K | H.

    Answers [B, S, H, D], as transformers' attention interface wants it. Probabilities are float32.
    """
    rows, heads, columns, size = query.shape
    groups = key.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    grouped = query.reshape(rows, groups, heads // groups * columns, size) * scale
    scores = (grouped @ key.transpose(2, 3)).view(rows, heads, columns, -1)  # (B, H, S, T)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    out = weights.view(rows, groups, -1, weights.shape[-1]) @ value  # (B, K, H/K * S, D)
    return out.view(rows, heads, columns, -1).transpose(1, 2).contiguous(), None


@contextmanager
def few_columns_attention(model: Model) -> Iterator[None]:
    """While open, the network uses `few_columns`, where its code lets the attention function be chosen."""
    net = model.net
    before = model.config._attn_implementation
    if not net.is_backend_compatible() or before == _NAME:
        yield
        return
    AttentionInterface.register(_NAME, few_columns)
    AttentionMaskInterface.register(_NAME, eager_mask)
    _choose_attention(model, _NAME)
    try:
        yield
    finally:
        _choose_attention(model, before)


def _choose_attention(model: Model, name: str) -> None:
    """Set the attention of the text part: in a wrapper the vision part keeps its own."""
    config = model.net.config
    parts = [key for key in config.sub_configs if getattr(config, key, None) is model.config]
    model.net.set_attn_implementation({parts[0]: name} if parts else name)


@contextmanager
def packed_mlps(model: Model, first: int, last: int, real: Tensor, read: Tensor) -> Iterator[None]:
    """While open, MLPs of layers first..last-1 see only tokens `real`, and the last one only tokens `read`.

    real, read: flat indices into [B * T]. Every other token's MLP output is 0. A family whose layer has no
    module around its MLP (OPT), or whose layers see whole rows, runs as it is; so do routed experts.
    """
    if not can_pack_mlps(model):
        yield
        return
    places = [index for index in range(first, last) if index in model.editable]
    mlps = [model.mlp(index) for index in places]
    originals = [mlp.__dict__.get("forward") for mlp in mlps]
    try:
        for index, mlp in zip(places, mlps, strict=True):
            mlp.forward = _on(mlp, read if index == last - 1 else real)
        yield
    finally:
        for mlp, original in zip(mlps, originals, strict=True):
            if original is None:
                mlp.__dict__.pop("forward", None)
            else:
                mlp.forward = original


def can_pack_mlps(model: Model) -> bool:
    """True where `packed_mlps` leaves tokens out."""
    return model.family.attention_only and all("." in down for down in choices(model.family.down))


def _on(mlp: nn.Module, tokens: Tensor) -> Callable[..., Tensor]:
    inner = mlp.forward

    def forward(hidden: Tensor, *added: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])  # (B * T, d)
        chosen = tokens.to(flat.device)
        rest = [more.reshape(flat.shape[0], -1)[chosen] for more in added]  # BLOOM's and MPT's MLPs add the residual
        out = inner(flat[chosen], *rest)
        whole: Tensor = out.new_zeros(flat.shape[0], out.shape[-1]).index_copy(0, chosen.to(out.device), out)
        return whole.view(hidden.shape)

    return forward
