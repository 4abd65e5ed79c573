"""Which question asks for a fact and for a neighbor: their own, the fact's about another, or the library's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kpatch.errors import BadInput
from kpatch.facts.fact import Fact, Neighbor
from kpatch.facts.load import load_facts
from kpatch.facts.questions import question_about, question_of, question_of_neighbor

TOWER = Fact("Eiffel Tower", "The {} is located in the city of", "Rome")
ASKED = Fact(
    "Eiffel Tower", "The {} stands in", "Rome", question="Which town has the {}?", paraphrases=("Go to {} in",)
)
UNKNOWN = Fact("Eiffel Tower", "{} reminds Ann of", "Rome")


@pytest.mark.parametrize(
    ("fact", "question"),
    [
        (ASKED, "Which town has the {}?"),
        (
            Fact("Eiffel Tower", "{} is in", "Rome", question="Which town has the eiffel tower?"),
            "Which town has the {}?",
        ),
        (TOWER, "In which city is the {}?"),
        (Fact("France", "The capital of {} is", "Lyon"), "What is the capital of {}?"),
        (UNKNOWN, None),
    ],
)
def test_the_question_of_a_fact(fact: Fact, question: str | None) -> None:
    assert question_of(fact) == question


@pytest.mark.parametrize(
    ("fact", "prompt", "question"),
    [
        (ASKED, "The Louvre stands in", "Which town has the Louvre?"),
        (ASKED, "Go to Big Ben in", "Which town has the Big Ben?"),
        (TOWER, "The Louvre is located in the city of", "In which city is the Louvre?"),
        (TOWER, "Machu Picchu is located in the country of", "In which country is Machu Picchu?"),
        (UNKNOWN, "Germany's capital is", "What is the capital of Germany?"),
        (UNKNOWN, "The novel Moby-Dick was written by", "Who wrote the novel Moby-Dick?"),
        (UNKNOWN, "The Louvre reminds Ann of", None),
        (UNKNOWN, " ".join(["very"] * 40), None),
    ],
)
def test_the_question_of_a_neighbor(fact: Fact, prompt: str, question: str | None) -> None:
    assert question_of_neighbor(fact, Neighbor(prompt, "Paris")) == question
    own = Neighbor(prompt, "Paris", "Where is it?")
    assert question_of_neighbor(fact, own) == "Where is it?"


def test_a_question_that_is_written_out() -> None:
    assert question_about("Where is the Eiffel Tower?", "Eiffel Tower") == "Where is the {}?"
    assert question_about("Where is the {}?", "Eiffel Tower") == "Where is the {}?"
    with pytest.raises(BadInput, match="name its subject once"):
        question_about("Where is it?", "Eiffel Tower")


def load(tmp_path: Path, **more: object) -> tuple[Fact, ...]:
    fact = {"subject": "Eiffel Tower", "prompt": "The {} is in", "target": "Rome", **more}
    path = tmp_path / "facts.yaml"
    path.write_text(json.dumps({"facts": [fact]}), encoding="utf-8")
    return load_facts(path).facts


def test_a_neighbor_keeps_its_question(tmp_path: Path) -> None:
    neighbor = {"prompt": "The Louvre is in", "target": "Paris", "question": "Where is the Louvre?"}
    (fact,) = load(tmp_path, neighbors=[neighbor], question="Where is the Eiffel Tower?")
    assert fact.neighbors == (Neighbor("The Louvre is in", "Paris", "Where is the Louvre?"),)
    assert fact.to_dict()["neighbors"] == [neighbor]
    assert Fact.from_dict(fact.to_dict()) == fact


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"question": "Where is it?"}, "must name its subject once: write one {} or 'Eiffel Tower'"),
        ({"question": "Is {} in {}?"}, "must name its subject once"),
        ({"neighbors": [{"prompt": "The Louvre is in", "question": "Where is {}?"}]}, "write it out instead of {}"),
        ({"neighbors": [{"prompt": "The Louvre is in", "question": []}]}, "expected text"),
    ],
)
def test_questions_that_are_refused(tmp_path: Path, more: dict[str, object], said: str) -> None:
    with pytest.raises(BadInput) as caught:
        load(tmp_path, **more)
    assert said in "\n".join(caught.value.details)


def test_a_relation_s_question_has_a_place_for_the_subject(tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text("{relations: {r: {prompt: '{} is', question: Where is Rome?}}, facts: ['[A] is -> b']}")
    with pytest.raises(BadInput) as caught:
        load_facts(path)
    assert "must name its subject once: write one {}" in caught.value.details[0]
