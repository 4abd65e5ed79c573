"""E_subj: the keys of other subjects, with those left out that a file edits or measures by."""

from __future__ import annotations

import pytest
import torch

from kpatch.facts.fact import Fact, Neighbor, fill
from kpatch.facts.tokens import encode
from kpatch.stats import subject_keys
from kpatch.stats.subject_keys import left_out, subject_moments, told
from tests.oracle import memit as oracle
from tests.support.models import tiny
from tests.support.reports import Recorder

FEW = (("Trains to {} are", "Paris"), ("{} opens", "Rome"), ("By the {} lies", "Mona Lisa"), ("In {} the", "Chicago"))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(subject_keys, "told", lambda: FEW)


def test_every_subject_that_is_taken_stands_in_one_statement() -> None:
    names = [name for _, name in told()]
    assert len(names) == len(set(names)) >= 2000
    assert all(template.count("{}") == 1 for template, _ in told())
    assert len({template for template, _ in told()}) > 150


def test_subjects_that_facts_and_neighbors_name_are_left_out() -> None:
    facts = [
        Fact("Paris", "{} lies in", "Italy", neighbors=(Neighbor("The songs of the Beatles are in"),)),
        Fact("Romeo", "{} loves", "Juliet", paraphrases=("With London in mind, {} loves",)),
    ]
    out = left_out(facts)
    assert {"Paris", "The Beatles"} & {name for _, name in told()} <= out
    assert not {"Rome", "London"} & out


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_moments_are_those_of_the_other_subjects_keys(family: str, few: None) -> None:
    model = tiny(family)
    facts = [Fact("Mona Lisa", "By the {} is", "Rome", neighbors=(Neighbor("In Chicago the river is"),))]
    moments = subject_moments(model, [1, 2], facts)
    row = encode(model.tokenizer, *FEW[0])
    for layer, moment in moments.items():
        key = oracle.key(model, row, layer).double()
        rome = encode(model.tokenizer, *FEW[1])
        keys = [key] + ([oracle.key(model, rome, layer).double()] if rome.subject_last else [])
        want = torch.stack([torch.outer(each, each) for each in keys]).mean(0)
        assert moment.count == len(keys)
        torch.testing.assert_close(moment.mean(), want, rtol=1e-4, atol=1e-6)


def test_the_sum_over_all_is_kept(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = tiny("llama"), []
    keys = subject_keys.keys_of
    monkeypatch.setattr(subject_keys, "keys_of", lambda *given: asked.append(len(given[2])) or keys(*given))
    first = subject_moments(model, [1], [])
    again = subject_moments(model, [1], [Fact("Chicago", "In {} is", fill("{}", "x"))], Recorder())
    assert asked[0] > 1
    assert asked[1:] == [1]
    assert again[1].count == first[1].count - 1
