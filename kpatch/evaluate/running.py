"""Rows that are written token by token, run together: rows leave where they end, and others join in their place.

A step reads all weights, however few its rows: many together are cheap, and a few that go on alone are dear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kpatch.evaluate.forward import logits_at
from kpatch.models.model import Model
from kpatch.models.partial_forward import Batch, align

_SHARED = 8  # tokens that all rows begin with, from which on they are run once: a run of their own costs a step


class Running:
    """Rows on a network, each before its next token. `numbers` name them.

    `batch` is what they were at first; what is cached has the columns of `mask` [B, T] but for those in `ids` [B, S].
    """

    def __init__(self, model: Model, numbers: Sequence[int], rows: Sequence[Sequence[int]]) -> None:
        self.model, self.numbers = model, list(numbers)
        self.batch: Batch = align(rows, [len(row) - 1 for row in rows], model.pad_id, model.device)
        self.mask, self.ids, self.positions = self.batch.mask, self.batch.ids, self.batch.positions
        self.cache: Any = None
        shared = min(_alike(rows), min(map(len, rows)) - 1)
        if len(rows) > 1 and shared >= _SHARED and has_plain_cache(model):
            self._run_once(rows[0][:shared])

    @property
    def width(self) -> int:
        """T: columns of the longest row, the padding of the others counted."""
        return int(self.mask.shape[1])

    def step(self) -> Tensor:
        """Run what has not run; logits [B, V] in float32 behind each row's last token."""
        every, new = torch.arange(len(self.numbers)), self.ids.shape[1]
        logits, out = logits_at(
            self.model,
            self.ids,
            every,
            torch.full_like(every, new - 1),
            self.mask[:, -new:].bool() if new > 1 else None,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = out.past_key_values
        return logits

    def take(self, tokens: Tensor) -> None:
        """Put one token [B] behind every row, to be run next."""
        self.ids, self.positions = tokens[:, None].to(self.mask.device), self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)

    def keep(self, places: Sequence[int]) -> None:
        """Let the other rows leave."""
        stay = torch.tensor(places, device=self.mask.device)
        self.cache.reorder_cache(stay)  # takes rows, whatever a layer keeps
        self.ids, self.positions, self.mask = self.ids[stay], self.positions[stay], self.mask[stay]
        self.numbers = [self.numbers[place] for place in places]

    def join(self, other: Running) -> None:
        """Take in the rows of another, which is at an end. Both have one token to run, and a plain cache."""
        width = max(int(some.mask.any(0).sum()) for some in (self, other))  # rows end in the last column
        pairs = zip(self.cache.layers, other.cache.layers, strict=True)
        for mine, theirs in pairs:
            for name in ("keys", "values"):
                both = [_as_wide(getattr(layer, name), 2, width - 1) for layer in (mine, theirs)]
                setattr(mine, name, torch.cat(both))
                setattr(theirs, name, None)
        self.mask = torch.cat([_as_wide(some.mask, 1, width) for some in (self, other)])
        self.ids = torch.cat([self.ids, other.ids])
        self.positions = torch.cat([self.positions, other.positions])
        self.numbers += other.numbers

    def _run_once(self, prefix: Sequence[int]) -> None:
        """Run what all rows begin with, and cache it as the first columns of every row.

        The columns behind it are run for all: of a short row they hold some of the prefix, which runs again, so that
        no padding stands inside a row.
        """
        size, device = len(prefix), self.mask.device
        found = self.model.net.base_model(input_ids=torch.tensor([list(prefix)], device=device), use_cache=True)
        padding = self.width - self.mask.sum(1, keepdim=True)  # [B, 1]
        columns = (torch.arange(size, device=device) - padding).clamp(min=0)  # [B, size]: padding has any token's
        self.cache = found.past_key_values
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                one = getattr(layer, name)[0]  # [H, size, D]
                setattr(layer, name, one[:, columns.to(one.device)].transpose(0, 1).contiguous())
        self.ids, self.positions = self.ids[:, size:], self.positions[:, size:]


def has_plain_cache(model: Model) -> bool:
    """Whether a model caches keys and values of all columns and nothing else, so that rows can be put side by side."""
    layers = DynamicCache(config=model.config).layers
    return model.family.attention_only and all(type(layer) is DynamicLayer for layer in layers)


def _alike(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    ordered = sorted(map(tuple, rows))
    pairs = enumerate(zip(ordered[0], ordered[-1], strict=False))  # what these two share, all share
    return next((at for at, (one, other) in pairs if one != other), min(len(ordered[0]), len(ordered[-1])))


def _as_wide(columns: Tensor, dim: int, width: int) -> Tensor:
    """`columns` with so many of them in `dim`: zeros on the left are put there, or padding on the left is cut off."""
    have = columns.shape[dim]
    if have >= width:
        return columns.narrow(dim, have - width, width)
    shape = list(columns.shape)
    shape[dim] = width - have
    return torch.cat([columns.new_zeros(shape), columns], dim=dim)
