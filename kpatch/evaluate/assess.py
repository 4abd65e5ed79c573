"""All that `eval` measures of one model as it stands: rates with intervals, writing, perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kpatch.evaluate.consequences import measure_consequences
from kpatch.evaluate.forms import ask_forms, prepare
from kpatch.evaluate.intervals import SAMPLES, mean_interval, with_intervals
from kpatch.evaluate.metrics import measure
from kpatch.evaluate.perplexity import perplexity
from kpatch.evaluate.rates import KINDS
from kpatch.evaluate.same_subject import ask_same_subject, kept
from kpatch.evaluate.score import BATCH_TOKENS
from kpatch.evaluate.writing import TOKENS, Writing, write_on
from kpatch.facts.fact import Fact, facts_in
from kpatch.models.model import Model, require_loaded
from kpatch.reporter import SILENT, Reporter

WRITING = ("fluency", "repetition", "consistency")  # what is measured of texts that a model writes


@dataclass(frozen=True)
class Wanted:
    """What to measure besides the rates.

    With `generate` the model writes texts of `tokens` tokens from every fact; they are compared with `references`,
    some texts for each fact. `forms` are those in which the model is asked (completion, question, chat); with
    `consequences` the probes of `evaluate.consequences` are asked too. `text` holds rows of ids whose perplexity is
    taken. The bootstrap draws `samples` times. `seed` is that of the bootstrap and of the writing.
    """

    generate: bool = False
    tokens: int = TOKENS
    references: Sequence[Sequence[str]] = ()
    forms: Sequence[str] = ()
    consequences: bool = False
    text: list[list[int]] | None = None
    samples: int = SAMPLES
    seed: int = 0
    batch_tokens: int = BATCH_TOKENS


@dataclass(frozen=True)
class Assessment:
    """`metrics` is METRICS with intervals, `facts` one object a fact; `writing` is {fluency, consistency, …} or {}.

    `asked` is {forms, consequences} with what was wanted of them.
    """

    metrics: dict[str, Any]
    facts: tuple[dict[str, Any], ...]
    writing: dict[str, Any] = field(default_factory=dict)
    perplexity: float | None = None
    asked: dict[str, Any] = field(default_factory=dict)


def assess(model: Model, facts: Sequence[Fact], wanted: Wanted | None = None, report: Reporter = SILENT) -> Assessment:
    """Measure a model as it is: the rates, and what `wanted` adds.

    With `generate`, the model answers paraphrases freely as well.

    Raises what `measure`, `prepare`, `write_on` and `perplexity` raise.
    """
    require_loaded(model)
    facts, wanted = facts_in(facts), wanted or Wanted()
    free = KINDS[:2] if wanted.generate else KINDS[:1]
    prepared = prepare(model, facts, wanted.forms, report)  # a form that the model does not have fails first
    found = measure(model, facts, wanted.batch_tokens, free=free, report=report)
    rows = found.facts
    asked: dict[str, Any] = {}
    if prepared:
        said = ask_forms(model, facts, prepared, wanted.samples, wanted.seed, wanted.batch_tokens, report)
        asked["forms"] = said.rates
        rows = tuple({**row, "forms": forms} for row, forms in zip(rows, said.facts, strict=True))
    if wanted.consequences:
        follows = measure_consequences(model, facts, wanted.samples, wanted.seed, wanted.batch_tokens, report)
        asked["consequences"] = follows.rates
        others = ask_same_subject(model, facts, wanted.batch_tokens, report)
        rows = tuple(
            {**row, "consequences": {**one, "same_subject": said}}
            for row, one, said in zip(rows, follows.facts, others, strict=True)
        )
    writing: dict[str, Any] = {}
    if wanted.generate:
        about = wanted.references or [fact.references for fact in facts]
        written = write_on(model, facts, about, wanted.tokens, wanted.seed, wanted.batch_tokens, report)
        writing = _means(written, wanted)
        rows = tuple(
            {**row, "written": list(texts), **{name: getattr(written, name)[number] for name in WRITING}}
            for number, (row, texts) in enumerate(zip(rows, written.texts, strict=True))
        )
    read = None if wanted.text is None else perplexity(model, wanted.text, report)
    return Assessment(with_intervals(found.outcomes, wanted.samples, wanted.seed), rows, writing, read, asked)


def compared(facts: Sequence[Fact], before: Assessment, after: Assessment, wanted: Wanted) -> Assessment:
    """`after` with what only a comparison tells: how many other answers about the facts' subjects are as `before`."""
    if not wanted.consequences:
        return after
    then, now = ([row["consequences"]["same_subject"] for row in one.facts] for one in (before, after))
    rates, said = kept(facts_in(facts), then, now, wanted.samples, wanted.seed)
    rows = tuple(
        {**row, "consequences": {**row["consequences"], "same_subject": one}}
        for row, one in zip(after.facts, said, strict=True)
    )
    follows = {**after.asked["consequences"], "same_subject": rates}
    return replace(after, facts=rows, asked={**after.asked, "consequences": follows})


def drift(before: float | None, after: float | None) -> float | None:
    """By what share perplexity rose: 0.05 for 5 %, negative where it fell."""
    return None if before is None or after is None or not math.isfinite(after) else after / before - 1


def _means(written: Writing, wanted: Wanted) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in WRITING:
        values = [value for value in getattr(written, name) if value is not None]
        result[name] = math.fsum(values) / len(values) if values else None
        result[f"{name}_interval"] = mean_interval(values, wanted.samples, wanted.seed)
    result["compared"] = sum(value is not None for value in written.consistency)
    return result
