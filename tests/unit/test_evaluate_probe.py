"""Ranks among objects: against scoring every object by itself, in every family, and by hand on the toy."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from kpatch.evaluate import continuations
from kpatch.evaluate.continuations import Prompts
from kpatch.evaluate.probe import Ranked, _choices, by_relation, rank_objects, rates
from kpatch.evaluate.score import score
from kpatch.facts.fact import Fact
from kpatch.facts.tokens import encode_many
from kpatch.models.model import Model
from tests.support import tokenizers
from tests.support.families import REPRESENTATIVE, slow_beyond
from tests.support.models import CONFIGS, tiny
from tests.support.toy import toy

torch.set_num_threads(1)

OBJECTS = (
    *("Rome", "Paris", "Brazil", "Germany", "the city of Rome", "the city of Paris", "the sea", "Beethoven"),
    *("Leonardo da Vinci", "Leonardo", "São Paulo", "Portuguese", "the", "the old town", "1984"),
)
FACTS = [
    Fact("Eiffel Tower", "The {} is located in", "the city of Paris", relation="place"),
    Fact("Mona Lisa", "The painter of the {} was", "Leonardo da Vinci", relation="painter"),
    Fact("Brazil", "People in {} speak", "Portuguese"),
    Fact("São Paulo", "{} lies in", "Brazil", relation="place"),
    Fact("It", "{} was in", "1984", relation="year"),
    Fact("river", "A {} runs past the mill and the market into", "the sea", relation="place"),
]
build = cache(tiny)


def plain(model: Model, facts: list[Fact] = FACTS, objects: tuple[str, ...] = OBJECTS) -> list[Ranked]:
    """Every object of every fact as a whole row."""
    found = []
    for fact in facts:
        rows = encode_many(model.tokenizer, [(fact.prompt, fact.subject, name, "") for name in objects])
        scored = score(model, [(row.ids[: row.prompt_len], row.ids[row.prompt_len :]) for row in rows])
        totals = {name: one.logprob for name, one in zip(objects, scored, strict=True)}
        truth = totals[fact.target]
        ahead = [name for name in objects if totals[name] > truth and name != fact.target]
        row = rows[objects.index(fact.target)]
        best = max(ahead, key=lambda name: totals[name], default=fact.target)
        found.append(Ranked(1 + len(ahead), best, truth, len(row.ids) - row.prompt_len))
    return found


def agree(found: list[Ranked], expected: list[Ranked]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.rank, one.best, one.tokens) == (other.rank, other.best, other.tokens)
        assert one.logprob == pytest.approx(other.logprob, abs=3e-4)


@pytest.mark.parametrize("family", slow_beyond(REPRESENTATIVE, CONFIGS))
def test_every_family_ranks_as_each_object_alone(family: str) -> None:
    model = build(family)
    expected = plain(model)
    assert len({one.rank for one in expected}) > 2
    assert max(one.tokens for one in expected) > 2
    agree(rank_objects(model, FACTS, [OBJECTS] * len(FACTS)), expected)


def test_batches_and_order_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    expected = plain(model)
    agree(rank_objects(model, FACTS[::-1], [OBJECTS] * 6, batch_tokens=1), expected[::-1])
    monkeypatch.setattr(continuations, "_ROWS", 2)
    agree(rank_objects(model, FACTS, [OBJECTS[::-1]] * 6), expected)


def test_each_fact_has_its_own_objects() -> None:
    model = build("llama")
    few = ("the city of Paris", "Rome", "the city of Rome")
    agree(rank_objects(model, FACTS[:2], [few, OBJECTS]), [plain(model, FACTS[:1], few)[0], plain(model)[1]])
    assert rank_objects(model, FACTS[:1], [("the city of Paris",)])[0].rank == 1


def test_without_objects_the_targets_of_all_facts_are_ranked() -> None:
    model, targets = build("llama"), tuple(fact.target for fact in FACTS)
    found = rank_objects(model, FACTS)
    agree(found, plain(model, FACTS, targets))
    assert len({one.rank for one in found}) > 1


def test_objects_that_cannot_win_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the target is very likely, nothing but the prompt and the target is run."""
    asked: list[int] = []
    original = Prompts._run

    def run(self: Prompts, rows: list[int], suffixes: list[list[int]]) -> torch.Tensor:
        asked.append(len(suffixes))
        return original(self, rows, suffixes)

    monkeypatch.setattr(Prompts, "_run", run)
    model = toy()
    fact = Fact("Tower", "The {} stands in", "Rome")
    objects = ("Rome", "Paris", "New York", "New", "is old")
    assert rank_objects(model, [fact], [objects])[0].rank == 1
    assert asked == []


def test_ranks_by_hand() -> None:
    """After "in": Rome 0.4, Paris 0.3, New 0.2, New York 0.2 × 0.8 = 0.16; after "at": New 0.5, New York 0.4."""
    model, objects = toy(), ("Paris", "New York", "Rome", "New", "Louvre")
    stands, visit = "The {} stands in", "Visit the {} at"
    facts = [
        Fact("Tower", stands, "Rome"),
        Fact("Arch", stands, "Paris"),
        Fact("Gate", stands, "New York"),
        Fact("Tower", visit, "New York"),
        Fact("Tower", stands, "Louvre"),
    ]
    found = rank_objects(model, facts, [objects] * 5)
    assert [(one.rank, one.best) for one in found] == [(1, "Rome"), (2, "Rome"), (4, "Rome"), (2, "New"), (5, "Rome")]
    assert found[2].logprob == pytest.approx(-1.832581, abs=1e-5)
    assert rates(found) == {
        "n": 5,
        "p_at_1": pytest.approx(0.2),
        "p_at_10": 1.0,
        "p_at_100": 1.0,
        "mrr": pytest.approx((1 + 1 / 2 + 1 / 4 + 1 / 2 + 1 / 5) / 5),
    }


def test_rates_of_relations() -> None:
    ranked = [Ranked(rank, "", -1.0, 1) for rank in (1, 11, 101, 2, 10, 100)]
    found = by_relation(FACTS, ranked)
    assert list(found) == ["place", "painter", "(none)", "year"]
    assert found["place"] == {
        "n": 3,
        "p_at_1": pytest.approx(1 / 3),
        "p_at_10": pytest.approx(2 / 3),
        "p_at_100": 1.0,
        "mrr": pytest.approx((1 + 1 / 2 + 1 / 100) / 3),
    }
    assert (found["(none)"]["p_at_100"], found["painter"]["p_at_10"]) == (0.0, 0.0)
    assert rates([])["mrr"] is None


@pytest.mark.parametrize("make", [tokenizers.byte_level, tokenizers.byte_level_split, tokenizers.metaspace])
def test_objects_are_the_tokens_that_follow_the_prompt(make: object) -> None:
    model = tiny("llama", tokenizer=make())  # type: ignore[operator]
    facts = [
        *FACTS,
        Fact("Tokyo", 'She said "{}" is "', "Rome"),
        Fact("東京", "{}は", "日本"),
        Fact("x", "{} (", "Rome"),
    ]
    objects = (*OBJECTS, "日本")
    for fact, choice in zip(facts, _choices(model, facts, [objects] * len(facts)), strict=True):
        rows = encode_many(model.tokenizer, [(fact.prompt, fact.subject, name, "") for name in objects])
        assert list(choice.ids) == [row.ids[row.prompt_len :] for row in rows]
