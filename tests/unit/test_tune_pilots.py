"""The pilot facts: enough of them, of kpatch's own, and paraphrases that nothing learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kpatch.facts.load import load_facts
from kpatch.facts.relations import relation_of, relations
from kpatch.facts.wordings import with_wordings
from kpatch.tune import pilots
from kpatch.tune.pilots import every_pilot, pilots_for
from tests.support.models import tiny
from tests.support.reports import Recorder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "facts"


def test_there_are_enough_in_two_equal_halves() -> None:
    facts = every_pilot()
    assert len(facts) == 24
    assert len({fact.relation for fact in facts}) == 12
    assert [fact.relation for fact in facts[0::2]] == [fact.relation for fact in facts[1::2]]
    assert len({fact.subject for fact in facts}) == len({fact.prompt for fact in facts}) * 2 == 24
    for fact in facts:
        assert fact.was
        assert fact.was != fact.target
        assert len(fact.paraphrases) == len(fact.neighbors) == 2
        assert all(neighbor.target and neighbor.target != fact.target for neighbor in fact.neighbors)
    prompts = [neighbor.prompt for fact in facts for neighbor in fact.neighbors]
    assert len(set(prompts)) == len(prompts), "the halves share no neighbor"


def test_paraphrases_are_nothing_that_is_learned() -> None:
    library = {wording for relation in relations().values() for wording in relation.wordings}
    for fact in with_wordings(every_pilot(), "auto"):
        assert len(fact.wordings) == 3, "the library knows the relation"
        assert not set(fact.paraphrases) & library
        assert all(relation_of(text) is None for text in fact.paraphrases)


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.yaml")), ids=lambda path: path.name)
def test_no_subject_is_one_that_benchmarks_measure(path: Path) -> None:
    measured = {fact.subject.casefold() for fact in load_facts(path).facts}
    assert measured
    assert not measured & {fact.subject.casefold() for fact in every_pilot()}
    asked = {text for fact in load_facts(path).facts for text in (*fact.paraphrases, fact.text())}
    assert not asked & {text for fact in every_pilot() for text in (*fact.paraphrases, fact.text())}


def test_pilots_whose_neighbors_the_model_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    report = Recorder()
    known = [fact.id for fact in every_pilot()[:9]]
    monkeypatch.setattr(pilots, "_known", lambda model, facts: frozenset(known))
    found = pilots_for(model, report)
    assert {fact.id for fact in (*found.choosing, *found.reporting)} == set(known)
    assert (len(found.choosing), len(found.reporting), found.left_out) == (5, 4, 15)
    assert report.warnings == []
    del known[7:]
    found = pilots_for(model, report)
    assert (len(found.choosing), len(found.reporting), found.left_out) == (12, 12, 0)
    assert "knows the neighbors of 7 of 24 pilot facts: all are taken" in report.warnings[0]


def test_a_neighbor_is_known_where_its_answer_is_likelier_than_the_target() -> None:
    """One whose right answer and target change places is known before or after, never both times."""
    model, (fact, *_) = tiny("llama"), every_pilot()
    turned = replace(
        fact,
        target=str(fact.neighbors[0].target),
        neighbors=(replace(fact.neighbors[0], target=fact.target),),
    )
    plain = replace(fact, neighbors=fact.neighbors[:1])
    both = [pilots._known(model, [one]) for one in (plain, turned)]
    assert sorted(map(len, both)) == [0, 1]
