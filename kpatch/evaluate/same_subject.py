"""What else moved: what a model says of a fact's subject otherwise, compared without the patches and with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kpatch.evaluate.answers import ANSWER_TOKENS, first_words, says, text_after
from kpatch.evaluate.complete import complete
from kpatch.evaluate.intervals import SAMPLES, grouped_interval
from kpatch.evaluate.score import BATCH_TOKENS
from kpatch.facts.derived import others_of
from kpatch.facts.fact import SLOT, Fact
from kpatch.facts.questions import plainly
from kpatch.facts.tokens import Item, encode_many
from kpatch.models.model import Model
from kpatch.reporter import SILENT, Reporter

Rows = Sequence[Sequence[dict[str, Any]]]  # for each fact what was asked and answered


def ask_same_subject(
    model: Model, facts: Sequence[Fact], batch_tokens: int = BATCH_TOKENS, report: Reporter = SILENT
) -> list[list[dict[str, Any]]]:
    """{asked, answer} for other things about each fact's subject: the first line of what the model writes, 6 tokens.

    What is asked says `facts.derived.others_of`. Raises BadInput for text that the tokenizer cannot take.
    """
    asked = [(number, text) for number, texts in enumerate(others_of(facts)) for text in texts]
    rows = [row.ids for row in encode_many(model.tokenizer, [Item(SLOT, plainly(text)) for _, text in asked])]
    found: list[list[dict[str, Any]]] = [[] for _ in facts]
    for (number, text), row, written in zip(
        asked, rows, complete(model, rows, ANSWER_TOKENS, batch_tokens=batch_tokens, report=report), strict=True
    ):
        answer = first_words(text_after(model.tokenizer, row, written.ids))
        found[number].append({"asked": text, "answer": answer})
    return found


def kept(
    facts: Sequence[Fact], before: Rows, after: Rows, samples: int = SAMPLES, seed: int = 0
) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
    """How much of `before`, what the model said without its patches, it says word for word `after`; and `after`.

    `rate` with an interval over facts, `target`: the share of answers that name the fact's new target and did not, n.
    Each answer has `kept` besides.
    """
    compared = [
        [
            {**now, "kept": now["answer"] == then["answer"], "target": _named(fact, now) and not _named(fact, then)}
            for then, now in zip(then_all, now_all, strict=True)
        ]
        for fact, then_all, now_all in zip(facts, before, after, strict=True)
    ]
    values = [(number, float(one["kept"])) for number, some in enumerate(compared) for one in some]
    named = [one["target"] for some in compared for one in some]
    rates = {
        "rate": sum(value for _, value in values) / len(values) if values else None,
        "interval": grouped_interval(values, samples, seed),
        "target": sum(named) / len(named) if named else None,
        "n": len(values),
    }
    return rates, compared


def _named(fact: Fact, one: dict[str, Any]) -> bool:
    return says(one["answer"], fact.target)
