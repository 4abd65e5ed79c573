"""Perplexity of a text: what a patch does to everything that it is not about."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from kpatch.errors import BadInput, CheckFailed
from kpatch.evaluate.forward import logits_at, vocabulary, window
from kpatch.evaluate.score import HEAD_NUMBERS
from kpatch.facts.tokens import lead_ids
from kpatch.models.model import Model
from kpatch.reporter import SILENT, Reporter

TOKENS = 8192
ROW = 512


def text_rows(model: Model, documents: Iterable[str], tokens: int = TOKENS, row: int = ROW) -> list[list[int]]:
    """The first `tokens` tokens of a text, or all of a shorter one, in rows of `row` begun as the tokenizer does.

    Raises BadInput for a text of fewer than two tokens.
    """
    start = list(lead_ids(model.tokenizer))
    inside = min(row, window(model) or row) - len(start)
    ids: list[int] = []
    for document in documents:
        if document.strip():
            ids += model.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= tokens:
            break
    ids = ids[:tokens]
    if len(start) + len(ids) < 2:
        raise BadInput("The text is too short to take a perplexity of")
    rows = [[*start, *ids[begin : begin + inside]] for begin in range(0, len(ids), inside)]
    return [one for one in rows if len(one) > 1]


@torch.no_grad()
def perplexity(model: Model, rows: list[list[int]], report: Reporter = SILENT) -> float:
    """exp of the mean of −log P over all tokens of the rows but their first, each given those before it.

    Raises CheckFailed for NaN.
    """
    total, count = 0.0, 0
    together = max(1, HEAD_NUMBERS // (vocabulary(model) * max(map(len, rows))))
    with report.task("Reading the text", sum(map(len, rows)), "token") as advance:
        for begin in range(0, len(rows), together):
            some = rows[begin : begin + together]
            total += _negative_log(model, some)
            count += sum(len(row) - 1 for row in some)
            advance(sum(map(len, some)))
    if math.isnan(total):
        raise CheckFailed(f"{model.name} gives NaN instead of probabilities for the text")
    try:
        return math.exp(total / count)
    except OverflowError:
        return math.inf


def _negative_log(model: Model, rows: list[list[int]]) -> float:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[model.pad_id] * (width - len(row))] for row in rows])  # [B, T]
    spots = [(number, column) for number, row in enumerate(rows) for column in range(len(row) - 1)]
    row, column = torch.tensor(spots).unbind(1)
    logits, _ = logits_at(model, ids, row, column)  # [P, V]
    targets: Tensor = ids[row, column + 1].to(logits.device)
    logp = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)
    return -float(logp.double().sum())
