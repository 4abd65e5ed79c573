"""LAMA's own ranks: an object of one token among all tokens that a model can say next.

Petroni et al. 2019, section 4.4, over the model's whole vocabulary. Special tokens are no words, so they do not count.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from kpatch.evaluate.answers import text_after
from kpatch.evaluate.complete import end_ids
from kpatch.evaluate.continuations import Prompts
from kpatch.evaluate.forward import batches, vocabulary
from kpatch.evaluate.probe import BATCH_TOKENS, Ranked
from kpatch.evaluate.score import HEAD_NUMBERS
from kpatch.facts.fact import Fact
from kpatch.facts.tokens import encode_many, item_of
from kpatch.models.model import Model, require_loaded
from kpatch.reporter import SILENT, Reporter


def in_vocabulary(model: Model, facts: Sequence[Fact]) -> list[Fact]:
    """The facts whose target is one token behind its prompt."""
    rows = encode_many(model.tokenizer, [item_of(fact) for fact in facts])
    return [fact for fact, row in zip(facts, rows, strict=True) if len(row.ids) == row.prompt_len + 1]


def rank_in_vocabulary(
    model: Model,
    facts: Sequence[Fact],
    aside: Sequence[Collection[str]] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    report: Reporter = SILENT,
) -> list[Ranked]:
    """Rank every fact's target, one token each, among the vocabulary; `aside` are other right answers of each fact.

    Raises ValueError for a target of several tokens (`in_vocabulary` leaves those out), BadInput for text that the
    tokenizer cannot take.
    """
    require_loaded(model)
    rows = encode_many(model.tokenizer, [item_of(fact) for fact in facts])
    if any(len(row.ids) != row.prompt_len + 1 for row in rows):
        raise ValueError("a target has several tokens")
    rights = [set(some) for some in aside] if aside is not None else [set[str]() for _ in facts]
    spared = [_tokens(model, fact, some) for fact, some in zip(facts, rights, strict=True)]
    special = {index for index, token in model.tokenizer.added_tokens_decoder.items() if token.special}
    never = sorted(index for index in special | end_ids(model) if index < vocabulary(model))
    results: dict[int, Ranked] = {}
    lengths = [row.prompt_len for row in rows]
    with report.task("Ranking tokens", len(facts), "fact") as advance:
        for places in batches(lengths, [1] * len(facts), batch_tokens, HEAD_NUMBERS // vocabulary(model)):
            kept = Prompts(model, [rows[place].ids[: lengths[place]] for place in places])
            for place, logprobs in zip(places, kept.first, strict=True):
                wanted = rows[place].ids[-1]
                value = logprobs[wanted].item()
                rivals = logprobs.index_fill(0, torch.tensor([*never, *spared[place]], dtype=torch.long), -torch.inf)
                rivals[wanted] = -torch.inf
                ahead = int((rivals > value).sum())
                best = int(rivals.argmax()) if ahead else wanted
                text = text_after(model.tokenizer, rows[place].ids[: lengths[place]], [best]).strip()
                results[place] = Ranked(1 + ahead, text, value, 1)
            advance(len(places))
    return [results[place] for place in range(len(facts))]


def _tokens(model: Model, fact: Fact, others: Collection[str]) -> list[int]:
    """The tokens of those other answers that are one token behind the fact's prompt."""
    items = [item_of(fact)._replace(target=other) for other in sorted(others)]
    rows = encode_many(model.tokenizer, items) if items else []
    return [row.ids[-1] for row in rows if len(row.ids) == row.prompt_len + 1]
