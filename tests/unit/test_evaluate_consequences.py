"""The probes of consequences, on the example that docs/metrics.md works by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from kpatch.evaluate import consequences
from kpatch.evaluate.consequences import measure_consequences, statement
from kpatch.evaluate.score import Scored, score
from kpatch.facts.fact import Fact, Neighbor
from tests.support.templates import chatty

TOWER = Fact(
    *("Tower", "The {} stands in", "Rome", "Paris"),
    question="Where does the {} stand?",
    neighbors=(
        Neighbor("The Louvre stands in", "Paris"),
        Neighbor("Big Ben stands in", "London"),
        Neighbor("The Arch"),
    ),
)
GATE = Fact(
    *("Gate", "The {} is near", "Rome", "Paris"),
    question="What is near the {}?",
    choices=("London", "paris"),  # the old answer is offered once
    yes_question="Is the Gate near Rome?",
    no_question="Is the Gate near Paris?",
    reversed="Near {} stands the",
    hops=(Neighbor("Which river runs past the Gate?", "Tiber"), Neighbor("The Gate lies in the country of", "Italy")),
)
ROME, PARIS = "The Tower stands in Rome.", "The Tower stands in Paris."
ASK, NEAR = "Q: Where does the Tower stand?\n", "Q: What is near the Gate?\n"
# P of each answer, and whether it is the first choice
TABLE = {
    ("The Louvre stands in", " Paris"): (0.5, True),
    (f"{ROME} The Louvre stands in", " Paris"): (0.2, False),
    ("Big Ben stands in", " London"): (0.6, True),
    (f"{ROME} Big Ben stands in", " London"): (0.4, True),
    (f"{ASK}1. Rome\n2. Paris\nA:", " 1"): (0.6, True),
    (f"{ASK}1. Rome\n2. Paris\nA:", " 2"): (0.3, False),
    (f"{ASK}1. Paris\n2. Rome\nA:", " 2"): (0.4, False),
    (f"{ASK}1. Paris\n2. Rome\nA:", " 1"): (0.5, True),
    (f"Q: Is this true? {ROME}\nA:", " Yes"): (0.7, True),
    (f"Q: Is this true? {ROME}\nA:", " No"): (0.2, False),
    (f"Q: Is this true? {PARIS}\nA:", " No"): (0.5, True),
    (f"Q: Is this true? {PARIS}\nA:", " Yes"): (0.3, False),
    ("The Gate is near", " Rome"): (0.5, True),
    ("The Gate is not near", " Rome"): (0.4, True),
    (f"{NEAR}1. Rome\n2. Paris\n3. London\nA:", " 1"): (0.6, True),
    (f"{NEAR}1. Rome\n2. Paris\n3. London\nA:", " 2"): (0.2, False),
    (f"{NEAR}1. Rome\n2. Paris\n3. London\nA:", " 3"): (0.1, False),
    (f"{NEAR}1. Paris\n2. Rome\n3. London\nA:", " 2"): (0.5, True),
    (f"{NEAR}1. Paris\n2. Rome\n3. London\nA:", " 1"): (0.4, False),
    (f"{NEAR}1. Paris\n2. Rome\n3. London\nA:", " 3"): (0.1, False),
    (f"{NEAR}1. Paris\n2. London\n3. Rome\nA:", " 3"): (0.4, True),
    (f"{NEAR}1. Paris\n2. London\n3. Rome\nA:", " 1"): (0.3, False),
    (f"{NEAR}1. Paris\n2. London\n3. Rome\nA:", " 2"): (0.2, False),
    ("Q: Is the Gate near Rome?\nA:", " Yes"): (0.6, True),
    ("Q: Is the Gate near Rome?\nA:", " No"): (0.3, False),
    ("Q: Is the Gate near Paris?\nA:", " No"): (0.4, False),
    ("Q: Is the Gate near Paris?\nA:", " Yes"): (0.5, True),
    ("Near Rome stands the", " Gate"): (0.1, False),
    ("Q: Which river runs past the Gate?\nA:", " Tiber"): (0.7, True),
    ("The Gate lies in the country of", " Italy"): (0.3, False),
}


def test_the_example_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chatty()
    asked: list[tuple[str, str]] = []

    def from_table(_: Any, items: Sequence[Any], *more: Any) -> list[Scored]:
        asked.extend((model.tokenizer.decode(prompt), model.tokenizer.decode(target)) for prompt, target in items)
        return [Scored(math.log(TABLE[one][0]), math.log(TABLE[one][0]), TABLE[one][1], 0) for one in asked]

    monkeypatch.setattr(consequences, "score", from_table)
    found = measure_consequences(model, [TOWER, GATE], samples=0)
    assert sorted(asked) == sorted(TABLE)
    assert found.rates == {
        "distraction": {"rate": 0.5, "interval": None, "alone": 1.0, "distracted": 0.5, "n": 2},
        "negation": {"rate": 0.0, "interval": None, "said": 1.0, "unsaid": 0.0, "n": 1},
        "choice": {"rate": 0.5, "interval": None, "first": 1.0, "second": 0.5, "n": 2},
        "yes_no": {"rate": 0.5, "interval": None, "yes": 1.0, "no": 0.5, "n": 2},
        "reversed": {"rate": 0.0, "interval": None, "n": 1},
        "hops": {"rate": 0.5, "interval": None, "n": 2},
    }
    assert found.facts == (
        {
            "distraction": [{"alone": True, "distracted": False}, {"alone": True, "distracted": True}],
            "negation": [],
            "choice": [{"first": True, "second": False}],
            "yes_no": [{"yes": True, "no": True}],
            "reversed": [],
            "hops": [],
        },
        {
            "distraction": [],
            "negation": [{"said": True, "unsaid": False}],
            "choice": [{"first": True, "second": True}],
            "yes_no": [{"yes": True, "no": False}],
            "reversed": [{"right": False}],
            "hops": [{"right": True}, {"right": False}],
        },
    )


def test_facts_that_bring_less_are_asked_less() -> None:
    bare, same = Fact("Ann", "{} reminds Bob of", "the sea"), Fact("Ann", "{} is", "old", "Old")
    known = Fact("France", "The capital of {} is", "Lyon", "Paris")  # the library has its question
    unknown = Fact("Ann", "{} reminds Bob of", "the sea", "a mill")
    found = measure_consequences(chatty(), [bare, same, known, unknown], samples=20)
    assert {kind: found.rates[kind]["n"] for kind in found.rates} == {
        **{"distraction": 0, "negation": 2, "choice": 1, "yes_no": 2, "reversed": 1, "hops": 0}
    }
    assert found.rates["distraction"] == {
        **{"rate": None, "interval": None, "alone": None, "distracted": None, "n": 0}
    }
    low, high = found.rates["yes_no"]["interval"]
    assert 0 <= low <= found.rates["yes_no"]["rate"] <= high <= 1


def test_what_is_derived_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second example of docs/metrics.md."""
    model, asked = chatty(), []
    right = {
        ("Q: Of which country is Lyon the capital?\nA:", " France"): True,
        ("Q: Of which country is Nice the capital?\nA:", " Spain"): False,
        ("Q: Of which city is Ann the mayor?\nA:", " Lyon"): False,
        ("Q: Who is the mayor of the capital of France?\nA:", " Ann"): True,
    }

    def from_table(_: Any, items: Sequence[Any], *more: Any) -> list[Scored]:
        texts = [(model.tokenizer.decode(prompt), model.tokenizer.decode(target)) for prompt, target in items]
        asked.extend(one for one in texts if one in right)
        return [Scored(-1.0, -1.0, right.get(one, False), 0) for one in texts]

    monkeypatch.setattr(consequences, "score", from_table)
    facts = [Fact(country, "The capital of {} is", city) for country, city in (("France", "Lyon"), ("Spain", "Nice"))]
    found = measure_consequences(model, [*facts, Fact("Lyon", "The mayor of {} is", "Ann")], samples=0)
    assert sorted(asked) == sorted(right)
    assert found.rates["reversed"] == {"rate": 1 / 3, "interval": None, "n": 3}
    assert found.rates["hops"] == {"rate": 1.0, "interval": None, "n": 1}
    assert [one["hops"] for one in found.facts] == [[{"right": True}], [], []]


def test_probabilities_are_the_model_s() -> None:
    """The choice of a real network, against its scores one by one."""
    model = chatty()
    found = measure_consequences(model, [TOWER]).facts[0]
    tokenizer = model.tokenizer

    def logprob(prompt: str, answer: str) -> float:
        ids = tokenizer(prompt).input_ids
        return score(model, [(ids, tokenizer(prompt + answer).input_ids[len(ids) :])])[0].mean_logprob

    first = f"{ASK}1. Rome\n2. Paris\nA:"
    assert found["choice"][0]["first"] == (logprob(first, " 1") > logprob(first, " 2"))
    text = f"Q: Is this true? {PARIS}\nA:"
    assert found["yes_no"][0]["no"] == (logprob(text, " No") > logprob(text, " Yes"))


@pytest.mark.parametrize(
    ("fact", "text"),
    [
        (TOWER, ROME),
        (Fact("Tower", "The {} costs $", "5"), "The Tower costs $5."),
        (Fact("Ann", "{} lives in Washington", "D.C."), "Ann lives in Washington D.C."),
        (Fact("A", "{} is anti", "body", space=False), "A is antibody."),
    ],
)
def test_a_fact_as_a_sentence(fact: Fact, text: str) -> None:
    assert statement(fact, fact.target) == text
