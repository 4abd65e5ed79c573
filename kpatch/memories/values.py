"""What values promote: vectors that join the residual stream, as tokens, through the model's own final norm and head.

The value of unit i is column i of W^l. Where a norm stands behind W^l, vectors pass through that norm first.
Sources: Geva et al. 2021 (2012.14913), section 4; Geva et al. 2022 (2203.14680), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kpatch.models.model import Model

_BLOCK_NUMBERS = 16_000_000  # logits at a time


@dataclass(frozen=True)
class Promoted:
    """What the two sides of every unit promote most: tokens [2, f] int32, chances [2, f], for v and for −v."""

    tokens: Tensor
    chances: Tensor


def unit_values(model: Model, layer: int, units: Tensor | None = None) -> Tensor:
    """The values of a layer's `units`, or of all of them: [u, d], in the model's dtype."""
    stored = model.numbers(model.weight_name(layer)).to(model.device)
    weight = stored if model.stores_transposed else stored.T  # (f, d)
    return weight if units is None else weight[units.to(weight.device)]


@torch.no_grad()
def promoted_logits(model: Model, layer: int, vectors: Tensor) -> Tensor:
    """Logits [u, V] float32 of vectors [u, d] that W^l puts out, each as if it alone were the residual stream.

    Each is brought to a mean square of 1, so that the ε of no norm counts; a vector of zeros stays one.
    """
    wide = vectors.float().contiguous()  # columns of W^l would reach the head one by one, ten times as slowly
    wide = wide / wide.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    hidden = wide.to(model.device, model.dtype)
    if model.family.post_norm:
        hidden = model.mlp_out(layer)(hidden)
    return model.logits(hidden).float()


def block_rows(model: Model) -> int:
    """How many rows of logits are taken at a time."""
    return max(1, _BLOCK_NUMBERS // int(model.net.get_input_embeddings().weight.shape[0]))


def all_promoted(model: Model, layer: int) -> Promoted:
    """The top token of every unit of a layer, by the sign of its coefficient, on the CPU."""
    values = unit_values(model, layer)
    odd = is_odd(model, layer)
    tokens: list[Tensor] = []
    chances: list[Tensor] = []
    for block in torch.split(values, block_rows(model)):
        logits = promoted_logits(model, layer, block)
        for signed in (logits, -logits if odd else promoted_logits(model, layer, -block)):
            top = signed.max(-1)
            tokens.append(top.indices)
            chances.append((top.values - signed.logsumexp(-1)).exp())
    return Promoted(_sides(tokens).int(), _sides(chances))


def _sides(parts: list[Tensor]) -> Tensor:
    """Blocks for v and for −v in turn as one [2, f]."""
    return torch.stack([torch.cat(parts[0::2]), torch.cat(parts[1::2])]).cpu()


def is_odd(model: Model, layer: int) -> bool:
    """Whether −v gives the negative logits of v, as it does where neither norm nor head has a bias."""
    vectors = unit_values(model, layer)[:4]
    logits, other = promoted_logits(model, layer, vectors), promoted_logits(model, layer, -vectors)
    return bool((logits + other).abs().max() <= 1e-5 * logits.abs().max())


def token_text(model: Model, token: int) -> str:
    """A token as text, with the space that it may begin with."""
    text: str = model.tokenizer.decode([token])
    return text


def top_tokens(model: Model, logits: Tensor, most: int) -> tuple[tuple[str, float], ...]:
    """The likeliest tokens by logits [V], at most so many, each with its probability."""
    top = logits.softmax(-1).topk(min(most, logits.shape[-1]))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return tuple((token_text(model, token), chance) for token, chance in pairs)


def ranks_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """The rank of token tokens[u] among logits [u, V]: 1 is the top one. [u]."""
    own = logits.gather(-1, tokens.to(logits.device).long()[:, None])
    return (logits > own).sum(-1) + 1
