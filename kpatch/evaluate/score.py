"""Batched log-probabilities of continuations under teacher forcing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kpatch import distributed
from kpatch.errors import BadInput, CheckFailed
from kpatch.evaluate.forward import batches, logits_at, vocabulary, window
from kpatch.models.model import Model
from kpatch.reporter import SILENT, Reporter

BATCH_TOKENS = 4096
HEAD_NUMBERS = 2**25  # logits of one batch at most: 128 MiB in float32, whatever the vocabulary

Ids = Sequence[int]


@dataclass(frozen=True, slots=True)
class Scored:
    """How a model takes one target after one prompt, with every earlier target token given (teacher forcing).

    logprob: natural logarithm of the whole target's probability; mean_logprob: the same per target token.
    greedy: every target token is the argmax; top: the id of the likeliest first token.
    """

    logprob: float
    mean_logprob: float
    greedy: bool
    top: int

    @property
    def probability(self) -> float:
        """P of the whole target."""
        return math.exp(self.logprob)

    @property
    def per_token(self) -> float:
        """P per target token: the geometric mean, which lets targets of different lengths be compared."""
        return math.exp(self.mean_logprob)


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of ids to run, and the items read off it."""

    ids: tuple[int, ...]
    items: tuple[int, ...]
    columns: tuple[int, ...]  # distinct, rising: where logits are wanted


@torch.no_grad()
def score(
    model: Model,
    items: Sequence[tuple[Ids, Ids]],
    batch_tokens: int = BATCH_TOKENS,
    report: Reporter = SILENT,
) -> list[Scored]:
    """Score (prompt_ids, target_ids) items; results come in the items' order, whatever the batches.

    Two items share a row where one's input is the beginning of the other's, as with two targets of one token behind
    one prompt. Raises BadInput for an empty prompt or target or one too long for the model, CheckFailed for NaN.
    """
    _check(model, items)
    results: list[Scored | None] = [None] * len(items)
    rows = _rows(items)
    with report.task("Scoring", total=len(items), unit="prompt") as advance:
        lengths, columns = [len(row.ids) for row in rows], [len(row.columns) for row in rows]
        planned = batches(lengths, columns, batch_tokens, HEAD_NUMBERS // vocabulary(model))

        def run(indices: Sequence[int]) -> list[tuple[int, Scored]]:
            found = _score_batch(model, [rows[i] for i in indices], items)
            advance(len(found))
            return found

        for found in distributed.share(planned, run):
            for index, scored in found:
                results[index] = scored
    return [scored for scored in results if scored is not None]


def _check(model: Model, items: Sequence[tuple[Ids, Ids]]) -> None:
    longest = window(model)
    for index, (prompt, target) in enumerate(items):
        if not len(prompt) or not len(target):
            raise BadInput(f"Item {index} has an empty {'target' if len(prompt) else 'prompt'}; nothing can be scored")
        if longest is not None and len(prompt) + len(target) - 1 > longest:
            raise BadInput(
                f"Item {index} is too long for {model.name}",
                details=[f"expected at most {longest} tokens", f"found {len(prompt) + len(target) - 1}"],
            )


def _rows(items: Sequence[tuple[Ids, Ids]]) -> list[_Row]:
    """The fewest rows that answer all items, in an order that does not depend on theirs.

    The last token of a target is never an input.
    """
    inputs = [(*prompt, *target[:-1]) for prompt, target in items]
    # In lexicographic order a row stands right before the rows that begin with it; attention is causal, so a longer
    # row's columns are the shorter one's too.
    host: tuple[int, ...] = ()
    groups: dict[tuple[int, ...], list[int]] = {}
    for index in sorted(range(len(items)), key=lambda i: inputs[i], reverse=True):
        ids = inputs[index]
        if host[: len(ids)] != ids:
            host = ids
        groups.setdefault(host, []).append(index)
    rows = []
    for ids, members in groups.items():
        columns = {len(items[i][0]) - 1 + step for i in members for step in range(len(items[i][1]))}
        rows.append(_Row(ids, tuple(members), tuple(sorted(columns))))
    return sorted(rows, key=lambda row: row.ids)


def _score_batch(model: Model, batch: Sequence[_Row], items: Sequence[tuple[Ids, Ids]]) -> list[tuple[int, Scored]]:
    width = max(len(row.ids) for row in batch)
    # Padding stands on the right, where causal attention never looks: no mask, and positions count from 0.
    ids = torch.tensor([[*row.ids, *[model.pad_id] * (width - len(row.ids))] for row in batch])  # [B, T]
    real = torch.arange(width) < torch.tensor([[len(row.ids)] for row in batch])
    wanted = [(number, column) for number, row in enumerate(batch) for column in row.columns]
    place = {key: position for position, key in enumerate(wanted)}
    row_index, column_index = torch.tensor(wanted).unbind(1)  # [P]
    logits, _ = logits_at(model, ids, row_index, column_index, real)  # [P, V]

    members = [(number, index) for number, row in enumerate(batch) for index in row.items]
    places: list[int] = []
    targets: list[int] = []
    for number, index in members:
        prompt, target = items[index]
        places += [place[number, len(prompt) - 1 + step] for step in range(len(target))]
        targets += target
    logprobs, best = read_targets(logits, torch.tensor(places), torch.tensor(targets))

    scored, begin = [], 0
    for _, index in members:
        target = items[index][1]
        end = begin + len(target)
        scored.append((index, scored_as(model, target, logprobs[begin:end], best[begin:end])))
        begin = end
    return scored


def scored_as(model: Model, target: Ids, logprobs: Sequence[float], best: Sequence[int]) -> Scored:
    """The score of a target whose tokens have log-probabilities `logprobs`, where `best` are the likeliest tokens.

    Raises CheckFailed for NaN.
    """
    total = math.fsum(logprobs)
    if math.isnan(total):
        raise CheckFailed(
            f"{model.name} gives NaN instead of probabilities",
            hint="a smaller patch, or `dtype` float32, keeps the numbers in range",
        )
    return Scored(total, total / len(target), list(best) == list(target), best[0])


def read_targets(logits: Tensor, places: Tensor, targets: Tensor) -> tuple[list[float], list[int]]:
    """Log-probabilities of targets [N] at rows `places` [N] of logits [P, V], and the argmax there."""
    places, targets = places.to(logits.device), targets.to(logits.device)
    norm = logits.logsumexp(-1)  # [P]
    best = logits.argmax(-1)  # [P]
    logprobs = logits[places, targets] - norm[places]
    return logprobs.double().tolist(), best[places].tolist()
