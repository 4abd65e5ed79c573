"""What may follow a prompt, asked many times over: prompts run once, and their cached columns serve every suffix."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kpatch.evaluate.forward import logits_at, vocabulary
from kpatch.evaluate.score import HEAD_NUMBERS
from kpatch.models.model import Model
from kpatch.models.partial_forward import Batch, align

_ROWS = 256  # suffixes run together: each has its prompt's cached columns copied


class Prompts:
    """Some prompts' columns, kept; `first` [B, V] are the log-probabilities of the token behind each."""

    @torch.no_grad()
    def __init__(self, model: Model, rows: Sequence[Sequence[int]]) -> None:
        self.model = model
        self.batch = align(rows, [len(row) - 1 for row in rows], model.pad_id, model.device)  # padded on the left
        every = torch.arange(len(rows))
        logits, out = logits_at(
            model,
            self.batch.ids,
            every,
            torch.full_like(every, self.batch.ids.shape[1] - 1),
            attention_mask=self.batch.mask,
            position_ids=self.batch.positions,
            use_cache=True,
        )
        self.cache: Any = out.past_key_values
        self.first = logits.log_softmax(-1).cpu()

    @torch.no_grad()
    def after(
        self, suffixes: Sequence[tuple[int, Sequence[int]]], wanted: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Log-probabilities of some tokens behind prompt + suffix.

        suffixes  (which prompt, its suffix of one token or more)
        wanted  for each suffix the tokens asked about
        """
        found: list[list[float]] = []
        most = max(1, min(_ROWS, HEAD_NUMBERS // vocabulary(self.model)))
        for begin in range(0, len(suffixes), most):
            some = suffixes[begin : begin + most]
            logp = self._run([index for index, _ in some], [suffix for _, suffix in some])
            for row, tokens in zip(logp, wanted[begin : begin + most], strict=True):
                found.append(row[list(tokens)].tolist())
        return found

    def _run(self, rows: Sequence[int], suffixes: Sequence[Sequence[int]]) -> Tensor:
        """log P [n, V] of the token behind each suffix, on the CPU."""
        ends = [(number, len(suffix) - 1) for number, suffix in enumerate(suffixes)]
        return logits_after(self.model, self.batch, self.cache, rows, suffixes, ends).log_softmax(-1).cpu()


def logits_after(
    model: Model,
    batch: Batch,
    cache: Any,
    rows: Sequence[int],
    suffixes: Sequence[Sequence[int]],
    spots: Sequence[tuple[int, int]],
) -> Tensor:
    """Logits [P, V] at `spots`, (which suffix, which token of it), of suffixes that stand behind rows of a batch.

    `batch` ends with the last token of every row, and `cache` holds its columns; it stays as it is.
    """
    chosen = torch.tensor(rows, device=batch.ids.device)
    width = max(map(len, suffixes))
    # Padding on the right, where no token of the suffix looks
    ids = torch.tensor([[*suffix, *[model.pad_id] * (width - len(suffix))] for suffix in suffixes])
    new = torch.tensor([[1] * len(suffix) + [0] * (width - len(suffix)) for suffix in suffixes])
    number, column = torch.tensor(spots).unbind(1)
    logits, _ = logits_at(
        model,
        ids,
        number,
        column,
        attention_mask=torch.cat([batch.mask[chosen], new.to(chosen.device)], dim=1),
        position_ids=batch.positions[chosen, -1:] + 1 + torch.arange(width, device=chosen.device),
        past_key_values=_rows_of(cache, chosen),
        use_cache=True,
    )
    return logits


def _rows_of(cache: Any, rows: Tensor) -> Any:
    """A cache with some rows of another, which stays as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in chosen.layers:
        for name in ("conv_states", "recurrent_states"):  # a linear attention's, in dicts
            if hasattr(layer, name):
                setattr(layer, name, dict(getattr(layer, name)))
        layer.reorder_cache(rows)
    return chosen
