"""LAMA's table: by hand on the toy model, and against slow versions written straight from the definitions."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch

from kpatch.evaluate.lama import kinds, lama, ranks_without_siblings
from kpatch.evaluate.probe import Ranked, rank_objects
from kpatch.facts.fact import Fact
from tests.support.models import tiny
from tests.support.toy import toy
from tests.unit.test_evaluate_probe import agree, plain

torch.set_num_threads(1)


def test_the_table_by_hand() -> None:
    """The example of docs/metrics.md."""
    facts = [
        Fact("Tower", "Visit the {} at", "New York", relation="seen at"),
        Fact("Arch", "Visit the {} at", "New", relation="seen at"),
        Fact("Tower", "The {} stands in", "Rome", relation="stands in"),
        Fact("Arch", "The {} stands in", "Rome", relation="stands in"),
        Fact("Gate", "The {} stands in", "Paris", relation="stands in"),
        Fact("Gate", "The {} is near", "Paris", relation="near"),
        Fact("Gate", "The {} is near", "Rome", relation="near"),
        Fact("Louvre", "The {} is in", "Paris"),
    ]
    model, objects = toy(), [("New York", "New", "Rome", "Paris")] * len(facts)
    ranked = rank_objects(model, facts, objects)
    assert [one.rank for one in ranked] == [2, 1, 1, 1, 2, 1, 2, 2]
    without = ranks_without_siblings(model, facts, facts, objects, ranked)
    assert [one.rank for one in without] == [2, 1, 1, 1, 2, 1, 1, 2]
    found = lama(facts, without)
    assert found is not None
    assert [tuple(row.values()) for row in found["relations"]] == [
        ("seen at", "1-1", 2, pytest.approx(1 / 2), pytest.approx(1 / 2), 1.0),
        ("stands in", "N-1", 3, pytest.approx(2 / 3), pytest.approx(2 / 3), 1.0),
        ("near", "N-M", 2, pytest.approx(1 / 2), 1.0, 1.0),
    ]
    assert list(found["relations"][0]) == ["relation", "kind", "facts", "frequency", "p_at_1", "p_at_10"]
    total = found["totals"][-1]
    assert (total["kind"], total["relations"], total["facts"], total["p_at_10"]) == ("total", 3, 7, 1.0)
    assert total["p_at_1"] == pytest.approx(13 / 18)
    assert total["frequency"] == pytest.approx(5 / 9)
    # Among the objects of the relation the Gate's Paris has only Rome before it, and "New" is no rival
    named = {"seen at": ("New York", "New"), "stands in": ("Rome", "Paris"), "near": ("Paris", "Rome")}
    own = [named[fact.relation or ""] for fact in facts[:-1]]
    assert [one.rank for one in rank_objects(model, facts[:-1], own)] == [2, 1, 1, 1, 2, 1, 2]


def slow_kind(facts: list[Fact]) -> str:
    """Every pair of facts is looked at."""
    pairs = list(product(facts, facts))
    if any(one.subject == two.subject and one.target != two.target for one, two in pairs):
        return "N-M"
    shared = any(one.subject != two.subject and one.target == two.target for one, two in pairs)
    return "N-1" if shared else "1-1"


def slow_frequency(facts: list[Fact]) -> float:
    """The best of all who always say the same."""
    return max(sum(fact.target == said for fact in facts) / len(facts) for said in [fact.target for fact in facts])


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


@pytest.mark.parametrize("seed", range(20))
def test_against_the_definitions(seed: int) -> None:
    draw = random.Random(seed)
    facts = list(
        dict.fromkeys(
            Fact(f"s{draw.randrange(12)}", "{} is", f"o{draw.randrange(12)}", relation=draw.choice("abcdef"))
            for _ in range(24)
        )
    )
    facts += [Fact("s", "{} is", "o")]
    draw.shuffle(facts)
    ranked = [Ranked(draw.randrange(1, 15), "", -1.0, 1) for _ in facts]
    found = lama(facts, ranked)
    assert found is not None
    groups = {
        row["relation"]: [fact for fact in facts if fact.relation == row["relation"]] for row in found["relations"]
    }
    assert set(groups) == {fact.relation for fact in facts if fact.relation}
    for row in found["relations"]:
        mine = [one.rank for fact, one in zip(facts, ranked, strict=True) if fact.relation == row["relation"]]
        assert row["kind"] == slow_kind(groups[row["relation"]])
        assert row["frequency"] == pytest.approx(slow_frequency(groups[row["relation"]]))
        assert row["facts"] == len(mine)
        assert row["p_at_1"] == pytest.approx(mine.count(1) / len(mine))
        assert row["p_at_10"] == pytest.approx(len([rank for rank in mine if rank < 11]) / len(mine))
    for total in found["totals"]:
        rows = [row for row in found["relations"] if total["kind"] in ("total", row["kind"])]
        assert (total["relations"], total["facts"]) == (len(rows), sum(row["facts"] for row in rows))
        for name in ("p_at_1", "p_at_10", "frequency"):
            expected = mean([row[name] for row in rows])
            assert total[name] == (None if expected is None else pytest.approx(expected))


def test_kinds() -> None:
    pairs = {"one": "ax by", "many": "ax bx", "several": "ax ay bz", "both": "ax ay bx", "single": "ax"}
    facts = [Fact(two[0], "{} is", two[1], relation=name) for name, text in pairs.items() for two in text.split()]
    found = {name: kind.kind for name, kind in kinds(facts).items()}
    assert found == {"one": "1-1", "many": "N-1", "several": "N-M", "both": "N-M", "single": "1-1"}
    again = [Fact("a  b", "{} is", "x", relation="r"), Fact("a b", "The {} is", "x", relation="r")]
    assert kinds(again)["r"].kind == "1-1", "one fact in two prompts"
    assert lama([Fact("a", "{} is", "x")], [Ranked(1, "x", -1.0, 1)]) is None


def test_other_true_objects_stand_in_nobody_s_way() -> None:
    """Against ranking each object by itself among the objects that are left."""
    model = tiny("llama")
    objects = ("Rome", "Paris", "the sea", "Brazil", "the old town", "1984")
    facts = [
        *(Fact("Mona Lisa", "The {} is in", name, relation="place") for name in ("Rome", "Paris", "the sea")),
        Fact("Mona Lisa", "The {} is in", "1984", relation="year"),
        Fact("river", "A {} runs into", "the sea", relation="place"),
        Fact("river", "A {} runs into", "Brazil"),
    ]
    expected = []
    for fact in facts:
        others = [one.target for one in facts[:3] if fact in facts[:3] and one is not fact]
        expected += plain(model, [fact], tuple(name for name in objects if name not in others))
    ranked = rank_objects(model, facts, [objects] * len(facts))
    assert [one.rank for one in ranked] != [one.rank for one in expected]
    agree(ranks_without_siblings(model, facts, facts, [objects] * len(facts), ranked), expected)
    some = ranks_without_siblings(model, facts, facts[:1], [objects], ranked[:1])
    agree(some, expected[:1])
