"""`kpatch probe --answers`: what a model answers to questions, counted by relation or topic."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kpatch.cli.output import Cell, Output, percent
from kpatch.cli.targets import check_patches, facts_and_model, open_model
from kpatch.errors import BadInput
from kpatch.evaluate.with_without import without_and_with
from kpatch.text import counted

if TYPE_CHECKING:
    from kpatch.evaluate.closed_book import Answered
    from kpatch.facts.question_files import Question


class Asking(NamedTuple):
    """What the options say: the form, how many questions, whether to list the answers, the bootstrap."""

    form: str | None
    limit: int | None
    per_fact: bool
    samples: int
    seed: int


def probe_answers(
    output: Output,
    first: str,
    second: str,
    patches: Sequence[Path],
    asking: Asking,
    loading: tuple[str, str, dict[str, str] | None, int | dict[str, int] | None],
) -> None:
    """Ask the model all questions and show what it knows; `first` and `second` are the questions and the model.

    `loading` is the device, the dtype, the modules' names and the limit of memory. Raises as the steps do.
    """
    from kpatch.facts.question_files import ANSWER_FORMS, SUFFIXES, load_questions

    started = time.monotonic()
    if asking.form not in (None, *ANSWER_FORMS):  # before a model is loaded
        raise BadInput(f"`form` {asking.form!r} is not known", details=[f"expected {' or '.join(ANSWER_FORMS)}"])
    path, address = facts_and_model(first, second, SUFFIXES)
    file = load_questions(path)
    for warning in file.warnings:
        output.warn(warning)
    questions = file.questions[: asking.limit]
    check_patches(patches)
    model = open_model(output, address, *loading)

    from kpatch.evaluate.closed_book import answer_questions, form_for

    form = form_for(model, asking.form)
    before, after, on = without_and_with(
        output, model, patches, lambda: answer_questions(model, questions, form, report=output)
    )
    empty = sum(not one.answer for one in after)
    if empty:
        output.warn(f"{counted(empty, 'empty answer')}, counted as wrong")
    found: dict[str, Any] = {
        "model": model.name,
        "patches": on,
        "form": form,
        "left_out": file.left_out,
        **_as_json(questions, after, asking),
        "unpatched": None if before is None else _as_json(questions, before, asking),
        "seconds": time.monotonic() - started,
    }
    rows = [_row(question, one) for question, one in zip(questions, after, strict=True)]
    output.result({**found, "questions": rows} if asking.per_fact else found)
    _print_rates(output, found)
    if asking.per_fact:
        _print_answers(output, rows)


def _as_json(questions: Sequence[Question], answered: Sequence[Answered], asking: Asking) -> dict[str, Any]:
    """The rates of all questions, and of each relation or topic."""
    from kpatch.evaluate.closed_book import by_group, rates

    groups = by_group(questions, answered, asking.samples, asking.seed)
    relations = [{"relation": name, **numbers} for name, numbers in groups.items()]
    return {"all": rates(answered, asking.samples, asking.seed), "relations": relations}


def _row(question: Question, one: Answered) -> dict[str, Any]:
    return {
        "question": question.text,
        "answers": list(question.answers),
        "relation": question.group,
        "answer": one.answer,
        "exact": one.exact,
        "recalled": one.recalled,
    }


def _print_rates(output: Output, found: Mapping[str, Any]) -> None:
    unpatched = found["unpatched"]
    before = {} if unpatched is None else {row["relation"]: row for row in unpatched["relations"]}
    rows: list[list[Cell]] = []
    if len(found["relations"]) > 1:
        rows += [[row["relation"], row["n"], *_cells(before.get(row["relation"]), row)] for row in found["relations"]]
    rows.append(["all", found["all"]["n"], *_cells(unpatched and unpatched["all"], found["all"])])
    output.table(("Relation", "n", "Exact", "95 %", "Recall", "95 %"), rows, right=(1, 2, 3, 4, 5))
    output.line(
        f"{found['model']}: {counted(found['all']['n'], 'question')} in the {found['form']} form,"
        f" {found['seconds']:.1f} s"
    )


def _cells(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[str]:
    cells = []
    for name in ("exact", "recall"):
        low_high = after[f"{name}_interval"]
        rate = percent(after[name])
        cells.append(f"{percent(before[name])} → {rate}" if before else rate)
        cells.append("–" if low_high is None else f"{100 * low_high[0]:.1f} – {100 * low_high[1]:.1f}")
    return cells


def _print_answers(output: Output, rows: Sequence[Mapping[str, Any]]) -> None:
    table: list[list[Cell]] = []
    for row in rows:
        verdict = "exact" if row["exact"] else "recalled" if row["recalled"] else "wrong"
        table.append([row["question"], " | ".join(row["answers"]), row["answer"], verdict])
    output.line()
    output.table(("Question", "Accepted", "Answer", "Verdict"), table)
