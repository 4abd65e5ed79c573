"""Sets of questions with answers: the question is the prompt, and its answer the target.

zsRE as MEND evaluates on it: Mitchell et al. 2022. WikiBigEdit: Thede et al. 2025. HalluEditBench: Huang et al. 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kpatch.facts.importers.record import Draft, answers_of, draft, neighbors, texts_of

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
        draft(
            record.get("subject"),
            record.get("src"),
            wanted,
            was,
            paraphrases=texts_of(record.get("rephrase")),
            neighbors=neighbors(questions, record.get("loc_ans", "")),
        )
    ]


def wikibigedit(record: _Record, _: str) -> list[Draft]:
    """`personas` is the question in another voice; multi-hop questions have another answer and are left out."""
    return [
        draft(
            record.get("subject"),
            record.get("update"),
            record.get("ans"),
            paraphrases=[*texts_of(record.get("rephrase")), *texts_of(record.get("personas"))],
            neighbors=neighbors(record.get("loc"), record.get("loc_ans", "")),
        )
    ]


def hallu(record: _Record, _: str) -> list[Draft]:
    """The right answer is the target, and what the chat model answered is `was`, where the file is about one model."""
    outputs = [key for key in record if key.startswith("output_")]
    return [
        draft(
            record.get("subject"),
            record.get("question"),
            record.get("object"),
            record.get(outputs[0], "") if len(outputs) == 1 else "",
            relation=record.get("relation", ""),
            paraphrases=texts_of(record.get("paraphrased_question")),
            neighbors=neighbors(record.get("locality_question"), ""),
        )
    ]
