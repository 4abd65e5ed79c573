"""How often a model gives the right answer by itself, in each form in which people ask: prompts, questions, a chat.

Nothing is forced and nothing is sampled. docs/metrics.md says when an answer counts.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kpatch.errors import BadInput
from kpatch.evaluate.answers import answer_rows, says, without
from kpatch.evaluate.intervals import SAMPLES, grouped_interval
from kpatch.evaluate.score import BATCH_TOKENS, Ids
from kpatch.facts.chat import Turn, chat_rows
from kpatch.facts.fact import SLOT, Fact, fill
from kpatch.facts.questions import FORMS, PLAIN, question_of, question_of_neighbor
from kpatch.facts.tokens import Item, encode_many
from kpatch.models.model import Model
from kpatch.reporter import SILENT, Reporter
from kpatch.text import counted

# A line end behind some words, or a full stop with white space behind it. Not behind an initial or a short form
_END = re.compile(
    r"(?<=\S)(?=\s*\n)|(?<!\b\w)(?<!\b(?:St|Mt|Dr|Mr|Ms|Jr|Sr|Ft))(?<!\bMrs)[.!?][\"'”’)]*(?=\s)|[。！？]"
)
_ENDS = " \t\n.,;:!?\"'“”‘’()*。！？"
_ARTICLE = re.compile(r"\A(?:the|an?) ")


@dataclass(frozen=True)
class FormRates:
    """`rates` by form, as they stand in the JSON output; `facts` has one object by form for every fact."""

    rates: dict[str, Any]
    facts: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class _Asked:
    """One prompt or question in one form, the answer that is right there, and the one that must not be named."""

    fact: int
    neighbor: bool
    text: str
    row: Ids
    right: str
    rival: str | None


@dataclass(frozen=True, slots=True)
class _Given:
    """What a model wrote."""

    asked: _Asked
    answer: str
    named: bool
    exact: bool


@dataclass(frozen=True)
class Prepared:
    """All that is asked in one form; `left_out` counts facts and neighbors without a question."""

    form: str
    asked: tuple[_Asked, ...]
    left_out: tuple[int, int]


def prepare(model: Model, facts: Sequence[Fact], forms: Sequence[str], report: Reporter = SILENT) -> list[Prepared]:
    """The prompts and questions of `facts` in each of `forms`, as token rows.

    Raises BadInput for an unknown form, and as `chat_rows` does where a model cannot be asked in chat.
    """
    wrong = [form for form in forms if form not in FORMS]
    if wrong:
        raise BadInput(f"Unknown form {wrong[0]!r}", details=[f"expected some of {', '.join(FORMS)}"])
    prepared = [_prepare(model, facts, form) for form in FORMS if form in forms]
    for one in prepared:
        if any(one.left_out):
            some = [counted(n, name) for n, name in zip(one.left_out, ("fact", "neighbor"), strict=True) if n]
            report.note(f"{' and '.join(some)} without a question: left out of the {one.form} form")
    return prepared


def ask_forms(
    model: Model,
    facts: Sequence[Fact],
    prepared: Sequence[Prepared],
    samples: int = SAMPLES,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    report: Reporter = SILENT,
) -> FormRates:
    """Let the model answer all that is prepared, and count. Empty answers count as wrong, with a warning."""
    rates: dict[str, Any] = {}
    rows: tuple[dict[str, Any], ...] = tuple({} for _ in facts)
    for one, texts in zip(prepared, _write(model, prepared, batch_tokens, report), strict=True):
        given = [_given(asked, text) for asked, text in zip(one.asked, texts, strict=True)]
        empty = sum(not answer.answer for answer in given)
        if empty:
            report.warn(f"{counted(empty, 'empty answer')} in the {one.form} form, counted as wrong")
        rates[one.form] = {
            name: _rates([answer for answer in given if answer.asked.neighbor is neighbor], left, samples, seed)
            for name, neighbor, left in zip(("edits", "neighbors"), (False, True), one.left_out, strict=True)
        }
        for row in rows:
            row[one.form] = {"edits": [], "neighbors": []}
        for answer in given:
            rows[answer.asked.fact][one.form]["neighbors" if answer.asked.neighbor else "edits"].append(
                {"asked": answer.asked.text, "answer": answer.answer, "named": answer.named, "exact": answer.exact}
            )
    return FormRates(rates, rows)


def counts(text: str, right: str, rival: str | None = None) -> bool:
    """Whether an answer names what is right and not its rival, which may be a part of what is right (York)."""
    if not says(text, right):
        return False
    if rival is None or not rival.strip() or rival.strip().casefold() == right.strip().casefold():
        return True
    return not says(without(text, right) if says(right, rival) else text, rival)


def is_exactly(text: str, right: str) -> bool:
    """Whether an answer is what is right and nothing else: case, signs around it and an article make no difference."""
    return _bare(text) == _bare(right)


def first_sentence(text: str) -> str:
    """An answer up to its first line end or full stop, without the space around it."""
    end = _END.search(text)
    return (text if end is None else text[: end.end()]).strip()


def _bare(text: str) -> str:
    return _ARTICLE.sub("", " ".join(text.split()).casefold().strip(_ENDS))


def _prepare(model: Model, facts: Sequence[Fact], form: str) -> Prepared:
    some = [one for number, fact in enumerate(facts) for one in _asked(number, fact, form)]
    asked = [one for one in some if one[2] is not None]
    turns = [(template or "", subject) for _, _, template, subject, _, _ in asked]
    if form == "chat":
        found = chat_rows(model.tokenizer, [Turn(fill(template, subject)) for template, subject in turns])
    elif form == "question":
        found = encode_many(model.tokenizer, [Item(PLAIN, fill(template, subject)) for template, subject in turns])
    else:
        found = encode_many(model.tokenizer, [Item(template, subject) for template, subject in turns])
    rows = tuple(
        _Asked(number, neighbor, fill(template or "", subject), row.ids, right, rival)
        for (number, neighbor, template, subject, right, rival), row in zip(asked, found, strict=True)
    )
    missing = [neighbor for _, neighbor, template, *_ in some if template is None]
    return Prepared(form, rows, (missing.count(False), missing.count(True)))


def _asked(number: int, fact: Fact, form: str) -> Iterator[tuple[int, bool, str | None, str, str, str | None]]:
    """(fact, whether a neighbor, text with {} or None, what goes there, right answer, rival) of all that is asked."""
    texts: Sequence[str | None] = (fact.prompt, *fact.paraphrases) if form == "completion" else (question_of(fact),)
    for text in texts:
        template, subject = (text, fact.subject) if text is None or SLOT in text else (SLOT, text)
        yield number, False, template, subject, fact.target, fact.was
    for neighbor in fact.neighbors:
        if neighbor.target is not None:
            said = neighbor.prompt if form == "completion" else question_of_neighbor(fact, neighbor)
            yield number, True, None if said is None else SLOT, said or "", neighbor.target, fact.target


def _write(model: Model, prepared: Sequence[Prepared], batch_tokens: int, report: Reporter) -> list[list[str]]:
    """The answers to all that is asked in each form; the forms are written together (`evaluate.running` says why)."""
    asked = [(one.form == "chat", asked.row) for one in prepared for asked in one.asked]
    texts = answer_rows(
        model,
        [row for _, row in asked],
        [chat for chat, _ in asked],
        lambda text: _END.search(text) is not None,
        batch_tokens=batch_tokens,
        doing=f"Asking in {counted(len(prepared), 'form')}",
        report=report,
    )
    ends = (text.strip() if chat else first_sentence(text) for (chat, _), text in zip(asked, texts, strict=True))
    return [list(itertools.islice(ends, len(one.asked))) for one in prepared]


def _given(asked: _Asked, text: str) -> _Given:
    return _Given(asked, text, counts(text, asked.right, asked.rival), is_exactly(text, asked.right))


def _rates(given: Sequence[_Given], left_out: int, samples: int, seed: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in ("named", "exact"):
        values = [(one.asked.fact, float(getattr(one, name))) for one in given]
        result[name] = sum(value for _, value in values) / len(values) if values else None
        result[f"{name}_interval"] = grouped_interval(values, samples, seed)
    empty = sum(not one.answer for one in given)
    return {**result, "n": len(given), "left_out": left_out, "empty": empty}
