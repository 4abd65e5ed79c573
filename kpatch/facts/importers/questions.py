"""Sets of questions with answers: the question is the prompt, and its answer the target.

zsRE as MEND evaluates on it: Mitchell et al. 2022. WikiBigEdit: Thede et al. 2025. HalluEditBench: Huang et al. 2024.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from kpatch.facts.importers.record import (
    Draft,
    RecordError,
    answer_of,
    answers_of,
    neighbor,
    neighbors,
    text_of,
    texts_of,
    written,
)

_Record = Mapping[str, Any]
ALT, ANSWERS = "alt", "answers"


def zsre(record: _Record, target: str) -> list[Draft]:
    """MEMIT teaches the true answer, EasyEdit the false `alt`."""
    answers = answers_of(record.get("answers"))
    true = answers[0] if answers else ""
    wanted, was = (true, "") if target == ANSWERS else (record.get("alt", ""), true)
    # A question mark as in MEMIT's own reading of the set
    questions = [text + "?" * (not text.endswith("?")) for text in texts_of(record.get("loc"))]
    return [
        written(
            record.get("subject"),
            record.get("src"),
            wanted,
            was,
            paraphrases=texts_of(record.get("rephrase")),
            neighbors=neighbors(questions, record.get("loc_ans", "")),
        )
    ]


def wikibigedit(record: _Record, _: str) -> list[Draft]:
    """`personas` is the question in another voice; the multi-hop question has an answer that follows."""
    return [
        written(
            record.get("subject"),
            record.get("update"),
            record.get("ans"),
            paraphrases=[*texts_of(record.get("rephrase")), *texts_of(record.get("personas"))],
            neighbors=neighbors(record.get("loc"), record.get("loc_ans", "")),
            hops=_answered([(record.get("mhop"), record.get("mhop_ans"))]),
        )
    ]


def hallu(record: _Record, _: str) -> list[Draft]:
    """The right answer is the target, and what the chat model answered is `was`, where the file is about one model.

    The letters of the choices are left out: they stand for one order, and `eval` asks every order.
    """
    outputs = [key for key in record if key.startswith("output_")]
    asked = [key for key in record if key.startswith("question_") and key.endswith("hop")]
    was = answer_of(record.get(outputs[0], "")) if len(outputs) == 1 else ""
    offered = _listed(text_of(record.get("multiple_choices"), "choices"))
    return [
        written(
            record.get("subject"),
            record.get("question"),
            record.get("object"),
            was,
            relation=record.get("relation", ""),
            paraphrases=texts_of(record.get("paraphrased_question")),
            neighbors=neighbors(record.get("locality_question"), ""),
            reversed=text_of(record.get("reversed_relation_question"), "reversed question"),
            hops=_answered([(record[key], record.get(key.replace("question", "answer"))) for key in asked]),
            choices=[one for one in offered if one not in (was, answer_of(record.get("object")))],
            yes_question=text_of(record.get("yes_question"), "yes question"),
            no_question=text_of(record.get("no_question"), "no question"),
        )
    ]


def _answered(asked: Sequence[tuple[Any, Any]]) -> list[Draft]:
    """Hops from questions and answers; what has no answer measures nothing."""
    return [neighbor(text_of(one, "hop"), answer) for one, some in asked if one and (answer := answer_of(some))]


def _listed(text: str) -> list[str]:
    """The texts of a list as Python writes it."""
    if not text:
        return []
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise RecordError(f"expected a list of choices, found {text[:60]!r}")
    return texts_of([str(one) for one in found])
