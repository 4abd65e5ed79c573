"""Questions with the answers that are accepted, from files of several kinds: what is asked without a book to look in.

A file holds questions by themselves, or records of a published set that are questions, or facts with questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kpatch.errors import BadInput
from kpatch.facts.check import kind_of
from kpatch.facts.fact import Fact, fill
from kpatch.facts.importers.formats import FORMATS, Format
from kpatch.facts.importers.read import import_facts, is_fact_table, read_records
from kpatch.facts.importers.record import RecordError, answers_of, text_of
from kpatch.facts.load import load_facts, read_text
from kpatch.facts.problems import Kind, Problems, at, bad_file, cut, did_you_mean, limited
from kpatch.facts.questions import question_of
from kpatch.facts.readers import SOURCES
from kpatch.facts.tables import read_lines
from kpatch.text import counted

ANSWER_FORMS = ("chat", "completion")  # how they are put to a model
KEYS = ("question", "answers", "relation", "topic")
QUESTION_FILE = Kind("question file", "docs/metrics.md")
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".yaml", ".yml")
_LINES, _YAML = (".jsonl", ".ndjson"), (".yaml", ".yml")
_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Question:
    """A question written out, the answers that are accepted (one or more), and the group that it is counted in."""

    text: str
    answers: tuple[str, ...]
    group: str | None = None


@dataclass(frozen=True)
class QuestionFile:
    """The questions of one file in its order, how many entries hold none, and what a user should know about it."""

    questions: tuple[Question, ...]
    left_out: int = 0
    warnings: tuple[str, ...] = ()


def load_questions(path: str | Path) -> QuestionFile:
    """Read the questions of one file: with answers by themselves, records of published sets, or facts.

    A question may have a `relation`, else a `topic`, which becomes its group. Raises BadInput for a file that is
    missing, empty or without questions, and one whose details are all errors of its own questions with their places.
    """
    path = Path(path)
    text = read_text(path, SUFFIXES, QUESTION_FILE)
    if not text.strip():
        raise BadInput(
            "The question file is empty", where=str(path), hint=f"{QUESTION_FILE.page} describes the format"
        )
    suffix = path.suffix.lower()
    if suffix in _YAML or (suffix == ".csv" and is_fact_table(path, None)):
        return _of_facts(path)
    placed = _lines(path, text) if suffix in _LINES else _numbered(path)
    if not placed:
        raise BadInput("The question file has no questions", where=str(path))
    first = next((record for _, record in placed if isinstance(record, Mapping)), {})
    row = next((row for row in FORMATS.values() if row.fits(first)), None)
    if row is None:
        return QuestionFile(tuple(_own(path, placed)))
    if row.name == "facts":
        return _of_facts(path)
    return _published(path, placed, row)


def _lines(path: Path, text: str) -> list[tuple[str, object]]:
    problems = Problems(QUESTION_FILE)
    rows = list(read_lines(text, problems))
    problems.raise_any(str(path), lambda _: ())
    return [(at(str(path), row.spot), row.data) for row in rows]


def _numbered(path: Path) -> list[tuple[str, object]]:
    return [(f"{path}: record {number}", record) for number, record in enumerate(read_records(path), 1)]


# Questions by themselves


def _own(path: Path, placed: Sequence[tuple[str, object]]) -> list[Question]:
    wrong: list[str] = []
    found = []
    for where, record in placed:
        problems = list(_problems(record))
        wrong += [f"{where}: {problem}" for problem in problems]
        if not problems and isinstance(record, Mapping):
            group = record.get("relation") or record.get("topic") or None
            answers = tuple(dict.fromkeys(answer.strip() for answer in record["answers"]))
            found.append(Question(record["question"].strip(), answers, group))
    if wrong:
        raise bad_file(str(path), wrong, kind=QUESTION_FILE)
    return found


def _problems(record: object) -> Iterator[str]:
    """What is wrong with a question's record."""
    if not isinstance(record, Mapping):
        yield f"expected an object with 'question' and 'answers', found {kind_of(record)}"
        return
    known = f"; the keys are {', '.join(KEYS)}"
    for key in record:
        if key not in KEYS:
            yield f"unknown key {key!r}{did_you_mean(key, KEYS, known)}"
    for key in ("question", "relation", "topic"):
        value = record.get(key, "")
        if not isinstance(value, str):
            yield f"expected text for {key!r}, found {kind_of(value)}"
        elif key == "question" and not value.strip():
            yield "'question' is missing" if key not in record else "the question is empty"
    answers = record.get("answers")
    if not answers:
        yield "'answers' is missing" if answers is None else "there is no accepted answer: 'answers' is empty"
    elif not isinstance(answers, list):
        yield f"expected a list of accepted answers, found {kind_of(answers)}"
    else:
        for answer in answers:
            if not isinstance(answer, str):
                yield f"expected text for an answer, found {kind_of(answer)}"
            elif not answer.strip():
                yield "an accepted answer is empty"


# Published sets: the question, its answers, its group


def _zsre(record: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return record.get("src"), record.get("answers"), None


def _hallu(record: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return record.get("question"), record.get("object"), record.get("relation") or record.get("topic")


def _wikibigedit(record: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return record.get("update"), record.get("ans"), None


_PUBLISHED: dict[str, Callable[[Mapping[str, Any]], tuple[Any, Any, Any]]] = {
    "zsre": _zsre,
    "hallu": _hallu,
    "wikibigedit": _wikibigedit,
}


def _published(path: Path, placed: Sequence[tuple[str, object]], row: Format) -> QuestionFile:
    if row.name not in _PUBLISHED:
        known = [f"{name}: {FORMATS[name].about}" for name in _PUBLISHED]
        raise BadInput(
            "The file holds no questions that can be asked as they are",
            where=str(path),
            details=[f"read as {row.about}", "expected questions with answers, facts with questions, or", *known],
            hint="`kpatch import` makes facts of such records, and a fact takes a question",
        )
    found, wrong = [], []
    for where, record in placed:
        try:
            if not isinstance(record, Mapping):
                raise RecordError(f"expected an object, found {kind_of(record)}")
            question, answers, group = _PUBLISHED[row.name](record)
            text, accepted = text_of(question, "question").strip(), answers_of(answers)
            if not text or not accepted:
                raise RecordError("there is no question" if not text else "there is no accepted answer")
            found.append(Question(text, tuple(dict.fromkeys(accepted)), text_of(group, "relation").strip() or None))
        except RecordError as error:
            wrong.append(f"{where}: {error}; left out")
    if not found:
        raise bad_file(str(path), wrong, kind=QUESTION_FILE)
    return QuestionFile(tuple(found), len(wrong), limited(wrong, shown=_SHOWN))


# Facts


def _of_facts(path: Path) -> QuestionFile:
    if path.suffix.lower() in SOURCES:
        file = load_facts(path, conflicts=True)
        facts, warnings = file.facts, file.warnings
    else:
        imported = import_facts(path, "facts")
        facts, warnings = imported.facts, limited((*imported.rejected, *imported.repeats), shown=_SHOWN)
    asked = [(fact, _asked(fact)) for fact in facts]
    found = tuple(Question(text, (fact.target,), fact.relation) for fact, text in asked if text)
    left_out = len(asked) - len(found)
    if not found:
        raise BadInput(
            "No fact of the file has a question",
            where=str(path),
            details=[f"found {counted(len(facts), 'fact')}, the first of which says {cut(facts[0].text())!r}"],
            hint="give the facts or their relations a `question`, as docs/facts.md says",
        )
    if left_out:
        warnings = (*warnings, f"{path}: {counted(left_out, 'fact')} without a question left out")
    return QuestionFile(found, left_out, warnings)


def _asked(fact: Fact) -> str | None:
    question = question_of(fact)
    return None if question is None else fill(question, fact.subject)
