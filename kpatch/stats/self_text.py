"""The corpus `self`: text sampled from the model, so that no data is needed at all.

Measured as good for MEMIT as WikiText-2 at a sixth of the tokens (docs/covariance.md).
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from kpatch.errors import BadInput
from kpatch.models.fast_forward import few_columns_attention
from kpatch.models.mixed_precision import mixed_precision
from kpatch.models.model import Model
from kpatch.reporter import Advance
from kpatch.stats.corpus import row_start

# Tokens sampled together: weights are read once for all their rows, whose keys and values must fit in memory
_GROUP_TOKENS = 15_360
_GROUP_BYTES = 8 * 2**30
_BLOCK = 256
_WORD = re.compile(r"[Ġ▁ ]?[A-Z][a-z]+")


def group_rows(model: Model, row: int) -> int:
    """How many rows of `row` tokens one group has: 15,360 tokens, or 10 f where that is less, or what 8 GiB hold.

    It depends on nothing but the model, since it decides the text.
    """
    config = model.config
    heads = _largest(config, "num_key_value_heads") or config.num_attention_heads
    size = _largest(config, "head_dim") or model.width // config.num_attention_heads
    rows = _GROUP_BYTES // (2 * model.n_layers * heads * size * model.dtype.itemsize * row)
    return int(max(1, min(rows, -(-min(_GROUP_TOKENS, 10 * model.mlp_width) // row))))


def _largest(config: Any, name: str) -> Any:
    """A setting, the largest of its values where layers have different ones (Gemma 4); None where there is none."""
    several = getattr(config, "per_layer_config", None)
    if not several:
        return getattr(config, name, None)
    return max((value for layer in several if (value := getattr(layer, name, None)) is not None), default=None)


@torch.no_grad()
def sample_group(model: Model, row: int, seed: int, group: int, advance: Advance = lambda amount: None) -> Tensor:
    """Group number `group` of the text that `seed` names: ids [G, row] int32, on the CPU.

    Temperature 1 over the whole vocabulary but for special tokens, which are never drawn; the first token (after a
    BOS, where the tokenizer adds one) is a random capitalized word. Draws come from a generator of the group's own,
    so a group depends on nothing but the weights, the seed and its number. Raises BadInput when logits are not finite.
    """
    size = group_rows(model, row)
    generator = torch.Generator().manual_seed(_mix(seed, group))
    words = opening_words(model)
    first = words[torch.randint(len(words), (size, 1), generator=generator)]  # (G, 1)
    start = torch.tensor(row_start(model), dtype=torch.long).expand(size, -1)
    ids = torch.cat([start, first], 1)[:, :row].to(model.device)
    draws = torch.rand(size, row, dtype=torch.float64, generator=generator).to(model.device, _wide(model.device))
    out = torch.empty(size, row, dtype=torch.long, device=model.device)
    out[:, : ids.shape[1]] = ids
    done = ids.shape[1]
    advance(size * done)
    forbidden: Tensor | None = None
    kept = (
        Cache(layers=[_Preallocated(row) for _ in range(model.n_layers)])
        if model.family.attention_only
        else DynamicCache(config=model.config)  # its layers keep more than keys and values
    )
    with few_columns_attention(model), mixed_precision(model):
        while done < row:
            logits = model.net(input_ids=ids, past_key_values=kept, use_cache=True, logits_to_keep=1).logits[:, -1]
            if forbidden is None:
                forbidden = _forbidden(model, logits.shape[-1])
            ids = _draw(logits.index_fill_(1, forbidden, -torch.inf), draws[:, done, None])
            out[:, done] = ids[:, 0]
            done += 1
            advance(size)
            if bool((ids < 0).any()):
                raise BadInput(
                    f"No text could be sampled from {model.name}",
                    details=["expected finite logits", f"found NaN or infinity in {model.dtype}"],
                    hint="load the model in a wider type: `dtype=float32` or `dtype=bfloat16`",
                )
    return out.to("cpu", torch.int32)


def _draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token of each row by inverting its distribution at `uniform` [G, 1]: [G, 1], -1 where it is not finite.

    First the block of 256 tokens, then the token in it: sums over a vocabulary are slow, and lose rare tokens.
    """
    wide = _wide(logits.device)
    p = logits.float().softmax(-1)  # (G, V)
    if p.shape[-1] % _BLOCK:
        p = torch.nn.functional.pad(p, (0, -p.shape[-1] % _BLOCK))
    p = p.view(len(p), -1, _BLOCK)  # (G, blocks, 256)
    sums = p.sum(-1).to(wide)  # (G, blocks); 256 numbers add up to 1e-7 in float32, and a copy of all is slow
    ends = sums.cumsum(-1)
    block = _invert(ends, uniform * ends[:, -1:])  # (G, 1)
    inside = p[torch.arange(len(p), device=p.device), block[:, 0]].cumsum(-1, dtype=wide)  # (G, 256)
    token = _invert(inside, uniform * ends[:, -1:] - (ends - sums).gather(1, block))
    return torch.where(ends[:, -1:].isfinite(), block * _BLOCK + token, -1)


def _invert(cumulative: Tensor, at: Tensor) -> Tensor:
    """The first place where cumulative [G, N] exceeds `at` [G, 1]; never of probability 0, whatever rounding did."""
    last = cumulative[:, -1:]
    below = torch.minimum(at, torch.nextafter(last, torch.zeros_like(last))).clamp(min=0)
    return torch.searchsorted(cumulative, below, right=True).clamp(max=cumulative.shape[-1] - 1)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _mix(seed: int, group: int) -> int:
    digest = hashlib.sha256(f"kpatch self {seed} {group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _special(tokenizer: Any) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(index for index, token in added if token.special)}


def opening_words(model: Model) -> Tensor:
    """Ids of tokens that are a capitalized word, with a space in front or without; else of all but special ones."""
    tokenizer = model.tokenizer
    special = _special(tokenizer)
    usual = [index for index in range(len(tokenizer)) if index not in special]
    tokens = tokenizer.convert_ids_to_tokens(usual)
    words = [index for index, token in zip(usual, tokens, strict=True) if token and _WORD.fullmatch(token)]
    return torch.tensor(words or usual)


def _forbidden(model: Model, vocabulary: int) -> Tensor:
    """Special tokens, which end or frame texts, and rows of the head that stand for no token, as indices below V."""
    special = {index for index in _special(model.tokenizer) if index < vocabulary}
    return torch.tensor(sorted({*special, *range(len(model.tokenizer), vocabulary)}), device=model.device).long()


class _Preallocated(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values in memory set aside for all columns: growing would copy them at every token."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.used = columns, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads = key_states.shape[:2]
        self.all_keys = key_states.new_empty(batch, heads, self.columns, key_states.shape[-1])
        self.all_values = value_states.new_empty(batch, heads, self.columns, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stop = self.used + key_states.shape[2]
        self.all_keys[:, :, self.used : stop] = key_states
        self.all_values[:, :, self.used : stop] = value_states
        self.used = stop
        self.keys, self.values = self.all_keys[:, :, :stop], self.all_values[:, :, :stop]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.used
