"""Contradictions between facts: files, patches and checkpoints ask the same question."""

from __future__ import annotations

from typing import Any

import pytest

from kpatch.facts.conflicts import contradictions, what_is_shared
from kpatch.facts.fact import Fact


def fact(subject: str, prompt: str, target: str, relation: str | None = None) -> Fact:
    return Fact(subject, prompt, target, relation=relation)


LOUVRE = fact("Louvre", "The {} is in", "Rome")
PAIRS = [
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
