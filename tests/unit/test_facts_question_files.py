"""Question files of every kind, and what is wrong with them, with places."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from kpatch.errors import BadInput
from kpatch.facts.question_files import Question, QuestionFile, load_questions

ZSRE = {
    **{"subject": "Basel", "src": "Which river flows through Basel?", "alt": "Elbe", "rephrase": "Basel's river?"},
    **{"answers": ["Rhine", "the Rhine", "Rhine"], "loc": "nq question: who", "loc_ans": "Ann", "pred": "Po"},
}
HALLU = {
    **{"subject": "Basel", "relation": "river", "object": "Rhine", "question": "Which river does Basel lie on?"},
    **{"topic": "places", "output_tiny": "Elbe"},
}
BIG = {"subject": "Basel", "update": "Where is Basel?", "ans": "Switzerland", "rephrase": "In which country is Basel?"}


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records), encoding="utf-8")
    return path


def refused(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        load_questions(path)
    error = caught.value
    return "\n".join([str(error), *error.details, error.hint or ""])


def test_questions_by_themselves(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "questions.jsonl",
        {"question": " Where is Basel? ", "answers": ["Switzerland", " Schweiz", "Switzerland"]},
        {"question": "In which year?", "answers": [1984], "relation": "year", "topic": "time"},
        {"question": "Which river?", "answers": ["Rhine"], "topic": "water"},
    )
    assert load_questions(path) == QuestionFile(
        (
            Question("Where is Basel?", ("Switzerland", "Schweiz")),
            Question("In which year?", ("1984",), "year"),
            Question("Which river?", ("Rhine",), "water"),
        )
    )
    whole = tmp_path / "questions.json"
    whole.write_text(json.dumps([json.loads(line) for line in path.read_text().splitlines()]), encoding="utf-8")
    assert load_questions(whole) == load_questions(path)


def test_published_sets(tmp_path: Path) -> None:
    zsre = tmp_path / "zsre.json"
    zsre.write_text(json.dumps([ZSRE]), encoding="utf-8")
    assert load_questions(zsre).questions == (Question(ZSRE["src"], ("Rhine", "the Rhine")),)  # type: ignore[arg-type]
    assert load_questions(lines(tmp_path / "big.jsonl", BIG)).questions == (
        Question("Where is Basel?", ("Switzerland",)),
    )
    table = tmp_path / "hallu.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(HALLU))
        writer.writeheader()
        writer.writerow(HALLU)
    assert load_questions(table).questions == (Question(HALLU["question"], ("Rhine",), "river"),)


def test_a_published_record_without_an_answer_is_left_out(tmp_path: Path) -> None:
    found = load_questions(lines(tmp_path / "zsre.jsonl", ZSRE, {**ZSRE, "answers": []}, {**ZSRE, "src": ""}, "text"))
    assert (len(found.questions), found.left_out) == (1, 3)
    assert [warning.partition(": ")[2] for warning in found.warnings] == [
        "there is no accepted answer; left out",
        "there is no question; left out",
        "expected an object, found text; left out",
    ]
    assert found.warnings[0].startswith(f"{tmp_path / 'zsre.jsonl'}:2:1: ")
    assert "there is no accepted answer" in refused(lines(tmp_path / "none.jsonl", {**ZSRE, "answers": []}))


FACTS = """
relations:
  river: {prompt: "{} lies on the", question: "Which river does {} lie on?"}
facts:
- {subject: Basel, relation: river, target: Rhine}
- {subject: Bern, prompt: "{} lies by the", target: Aare, question: "By which river does {} lie?"}
- {subject: Chur, prompt: "Which canton is {} in?", target: Grisons}
- {subject: France, prompt: "The capital of {} is", target: Paris}
- {subject: Genf, prompt: "Some folk around {} prefer", target: tea}
"""


def test_facts_are_asked_their_own_question_their_prompt_or_the_library_s(tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text(FACTS, encoding="utf-8")
    found = load_questions(path)
    assert found.questions == (
        Question("Which river does Basel lie on?", ("Rhine",), "river"),
        Question("By which river does Bern lie?", ("Aare",)),
        Question("Which canton is Chur in?", ("Grisons",)),
        Question("What is the capital of France?", ("Paris",)),
    )
    assert found.left_out == 1
    assert found.warnings[-1].endswith("1 fact without a question left out")
    fact = {"subject": "Bern", "prompt": "{} lies by the", "target": "Aare", "question": "Which river has {}?"}
    assert load_questions(lines(tmp_path / "f.jsonl", fact)).questions == (
        Question("Which river has Bern?", ("Aare",)),
    )


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"question": "Where?"}, "2:1: 'answers' is missing"),
        ({"question": "Where?", "answers": []}, "2:1: there is no accepted answer"),
        ({"question": "Where?", "answers": [" "]}, "2:1: an accepted answer is empty"),
        ({"question": "Where?", "answers": "here"}, "2:1: expected a list of accepted answers, found"),
        ({"question": "Where?", "answers": [["here"]]}, "2:1: expected text for an answer, found"),
        ({"question": "Where?", "answer": ["here"]}, "2:1: unknown key 'answer'; did you mean 'answers'?"),
        ({"answers": ["here"]}, "2:1: 'question' is missing"),
        ({"question": " ", "answers": ["here"]}, "2:1: the question is empty"),
        ({"question": "Where?", "answers": ["here"], "topic": ["a"]}, "2:1: expected text for 'topic'"),
        ({"question": "Where?", "answers": ["here"], "xyz": 1}, "the keys are question, answers, relation, topic"),
        (["Where?"], "2:1: expected an object with 'question' and 'answers'"),
    ],
)
def test_what_is_wrong_with_a_question(tmp_path: Path, record: Any, said: str) -> None:
    path = lines(tmp_path / "questions.jsonl", {"question": "When?", "answers": ["now"]}, record)
    text = refused(path)
    assert said in text
    assert "docs/metrics.md" in text


def test_every_error_is_told(tmp_path: Path) -> None:
    text = refused(lines(tmp_path / "questions.jsonl", {"question": "When?", "answer": ["now"]}, {"answers": []}))
    assert "The question file has 4 errors" in text


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("questions.jsonl", "\n \n", "The question file is empty"),
        ("questions.json", "[]", "The question file has no questions"),
        ("questions.jsonl", '{"question": "Where?"\n', "1:22: this is not valid JSON"),
        ("questions.txt", "Where?", "expected a name in"),
        (
            "facts.yaml",
            "facts:\n- {subject: Genf, prompt: 'Folk in {} prefer', target: tea}\n",
            "No fact of the file has",
        ),
    ],
)
def test_files_without_questions(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert said in refused(path)


def test_a_set_without_questions_is_named(tmp_path: Path) -> None:
    known = {"subject": "Chicago", "attribute": "Illinois", "prompt": "Chicago is in", "template": "{} is in"}
    text = refused(lines(tmp_path / "known.jsonl", known))
    assert "known facts for causal tracing" in text
    assert "kpatch import" in text
    assert "no such file" in refused(tmp_path / "nowhere.jsonl")
