"""Contradictions between facts: files, patches and checkpoints ask the same question."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kpatch.facts.conflicts import contradictions, moved, what_is_shared
from kpatch.facts.fact import Fact, Neighbor


def fact(subject: str, prompt: str, target: str, relation: str | None = None) -> Fact:
    return Fact(subject, prompt, target, relation=relation)


LOUVRE = fact("Louvre", "The {} is in", "Rome")
PAIRS = [
    (fact("Hawai'i", "{} is in", "Rome"), fact("Hawai’i", "{} is in", "Oslo"), "text"),
    (fact("Rolls-Royce", "{} is in", "Rome"), fact("Rolls\u2011Royce", "{} is in", "Oslo"), "text"),
    (LOUVRE, fact("Louvre", "The  {} is in", "Oslo"), "prompt"),
    (LOUVRE, fact("The Louvre", "{} is in", "Oslo"), "text"),
    (LOUVRE, fact("is in", "The Louvre {}", "Oslo"), "text"),
    (LOUVRE, fact("Louvre", "The {} is in\n", "Oslo"), "prompt"),
    (fact("Cafe\u0301", "{} is in", "Rome"), fact("Caf\u00e9", "{} is in", "Oslo"), "prompt"),
    (
        fact("Peru", "{} has the capital", "Lima", "capital"),
        fact("Peru", "{} is ruled from", "Ica", "capital"),
        "relation",
    ),
    (LOUVRE, fact("The Louvre", "{} is in", "Rome"), None),
    (LOUVRE, fact("Louvre", "The {} is in", " Rome"), None),
    (LOUVRE, fact("Louvre", "The {} was in", "Oslo"), None),
    (LOUVRE, fact("Louvre", "the {} is in", "Oslo"), None),
    (fact("Peru", "{} has the capital", "Lima", "capital"), fact("Chile", "{} is ruled from", "Ica", "capital"), None),
    (fact("Peru", "{} has the capital", "Lima"), fact("Peru", "{} is ruled from", "Ica"), None),
]


@pytest.mark.parametrize("as_mapping", [False, True])
@pytest.mark.parametrize(("first", "second", "shared"), PAIRS)
def test_two_facts(first: Fact, second: Fact, shared: str | None, as_mapping: bool) -> None:
    facts: list[Any] = [first, second]
    if as_mapping:
        facts = [one.to_dict() for one in facts]
    assert [tuple(clash) for clash in contradictions(facts)] == ([] if shared is None else [(0, 1, shared)])


PERU = Fact("Peru", "{} has the capital", "Lima", wordings=("{} is ruled from",))


@pytest.mark.parametrize("as_mapping", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "clash"),
    [
        (PERU, Fact("Peru", "{} is ruled from", "Ica"), True),
        (Fact("Peru", "{} is ruled from", "Ica"), PERU, True),
        (PERU, Fact("Peru", "{} is led from", "Ica", wordings=("{} is ruled from",)), True),
        (PERU, Fact("Peru", "{} is ruled from", "Lima"), False),
        (PERU, Fact("Chile", "{} is led from", "Ica", wordings=("{} is ruled from",)), False),
    ],
)
def test_wordings_are_learned_so_they_contradict_too(first: Fact, second: Fact, clash: bool, as_mapping: bool) -> None:
    facts: list[Any] = [one.to_dict() if as_mapping else one for one in (first, second)]
    assert [tuple(one) for one in contradictions(facts, wordings=True)] == ([(0, 1, "wording")] if clash else [])
    assert contradictions(facts) == []


@pytest.mark.parametrize(
    ("second", "clash"),
    [
        (Fact("Louvre", "The {} stands in", "Oslo", question="Where is the {}?"), "question"),
        (Fact("Louvre", "Where is the {}?", "Oslo"), "wording"),
        (Fact("Louvre", "The {} stands in", "Oslo", wordings=("Where is the {}?",)), "wording"),
        (Fact("Louvre", "The {} stands in", "Rome", question="Where is the {}?"), None),
        (Fact("Prado", "The {} stands in", "Oslo", question="Where is the {}?"), None),
    ],
    ids=["question", "prompt", "wording", "same target", "other subject"],
)
def test_questions_are_learned_so_they_contradict_too(second: Fact, clash: str | None) -> None:
    first = replace(LOUVRE, question="Where is the {}?")
    found = contradictions([first, second], wordings=True)
    assert [one.shared for one in found] == ([clash] if clash else [])


def test_each_fact_is_compared_with_the_first_that_says_the_same() -> None:
    facts = [LOUVRE, fact("The Louvre", "{} is in", "Oslo"), fact("Louvre", "The {} is in", "Rome"), LOUVRE]
    facts.append(fact("Louvre", "The {} is in", "Bonn"))
    assert [(clash.earlier, clash.later) for clash in contradictions(facts)] == [(0, 1), (0, 4)]


def test_facts_of_one_owner_are_not_compared() -> None:
    facts = [LOUVRE, fact("The Louvre", "{} is in", "Oslo")]
    assert contradictions(facts, ["a", "a"]) == []
    assert len(contradictions(facts, ["a", "b"])) == 1


def test_what_is_shared_names_the_relation_or_gives_the_text() -> None:
    peru = {"subject": "Peru", "prompt": "{} has the capital", "target": "Lima", "relation": "capital"}
    assert what_is_shared(peru, "relation") == "capital of Peru"
    assert what_is_shared(peru, "text") == what_is_shared(peru, "prompt") == "Peru has the capital"


TOWER = Fact("Eiffel Tower", "{} is located in", "Rome", where="f:1:1")


def asking(prompt: str, target: str | None = None) -> Fact:
    return Fact("Big Ben", "{} is located in", "Oslo", neighbors=(Neighbor(prompt, target),), where="f:2:1")


@pytest.mark.parametrize(
    ("others", "moves"),
    [
        ([asking("Eiffel  Tower is located in", "Paris")], True),
        ([asking("Eiffel Tower is located in")], True),  # whatever its answer is, it must stay
        ([asking("Eiffel Tower is located in", "Rome")], False),  # where the fact moves it to
        ([asking("The location of the Eiffel tower is", "Paris")], True),
        ([asking("Eiffel Tower was designed by", "Eiffel")], False),
        ([asking("The Eiffel Towers are located in", "Paris")], False),
        ([asking("The Louvre is located in", "Paris")], False),
        ([asking("Big Ben is located in", "London")], False),  # its own subject: lint says so
        ([asking("The home of Eiffel Tower is", "Paris"), replace(TOWER, paraphrases=("The home of {} is",))], True),
        ([Fact("Eiffel Tower", "{} is in", "Oslo", paraphrases=("{} is located in",), where="f:2:1")], True),
        ([Fact("Eiffel Tower", "{} is in", "Rome", paraphrases=("{} is located in",), where="f:2:1")], False),
        ([Fact("Eiffel Tower", "{} is in", "Oslo", paraphrases=("{} lies in",), where="f:2:1")], False),
    ],
)
def test_what_another_fact_moves_on_purpose(others: list[Fact], moves: bool) -> None:
    facts = [TOWER, *others] if len(others) == 1 else [others[1], others[0]]
    found = moved(facts)
    assert len(found) == moves
    if moves:
        assert found[0].startswith("f:2:1: the ")
        assert found[0].endswith("is what the fact at f:1:1 edits, so it will move on purpose, to 'Rome'")
