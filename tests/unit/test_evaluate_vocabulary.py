"""Ranks among the whole vocabulary: by hand on the toy model, and against plain sorting."""

from __future__ import annotations

import pytest
import torch

from kpatch.evaluate.complete import end_ids
from kpatch.evaluate.lama import lama, siblings
from kpatch.evaluate.vocabulary import in_vocabulary, rank_in_vocabulary
from kpatch.facts.fact import Fact
from tests.support.models import tiny
from tests.support.toy import toy

torch.set_num_threads(1)

FACTS = [
    Fact("Tower", "Visit the {} at", "New York", relation="seen at"),
    Fact("Arch", "Visit the {} at", "New", relation="seen at"),
    Fact("Tower", "The {} stands in", "Rome", relation="stands in"),
    Fact("Gate", "The {} stands in", "Paris", relation="stands in"),
    Fact("Gate", "The {} is near", "Paris", relation="near"),
    Fact("Gate", "The {} is near", "Rome", relation="near"),
    Fact("Gate", "near", "other", relation="near"),
]


def test_the_example_by_hand() -> None:
    """docs/metrics.md: behind "near" come Paris 0.6, Rome 0.2, other 0.15, New 0.05."""
    model = toy()
    facts = in_vocabulary(model, FACTS[:6])
    assert facts == FACTS[1:6], "New York has two tokens"
    ranked = rank_in_vocabulary(model, facts)
    assert [one.rank for one in ranked] == [1, 1, 2, 1, 2]
    assert [one.best for one in ranked] == ["New", "Rome", "Rome", "Paris", "Paris"]
    without = rank_in_vocabulary(model, facts, siblings(FACTS, facts))
    assert [one.rank for one in without] == [1, 1, 2, 1, 1], "the Gate is near Paris as well"
    found = lama(facts, without)
    assert found is not None
    assert found["totals"][-1]["p_at_1"] == pytest.approx((1 + 1 / 2 + 1) / 3)


def test_what_ends_a_text_is_no_word() -> None:
    """Behind Rome the text ends with 0.9, and "other" has 0.1."""
    (one,) = rank_in_vocabulary(toy(), [Fact("Tower", "The {} stands in Rome", "other")])
    assert (one.rank, one.best) == (1, "other")


def test_against_plain_sorting() -> None:
    model = tiny("llama")
    facts = in_vocabulary(model, [Fact("Rome", "{} is in", word) for word in ("a", "the", "Italy", "b", "Xylophones")])
    assert facts
    special = [index for index in range(len(model.tokenizer)) if model.tokenizer.added_tokens_decoder.get(index)]
    for fact, one in zip(facts, rank_in_vocabulary(model, facts), strict=True):
        ids = model.tokenizer("Rome is in", return_tensors="pt").input_ids
        with torch.no_grad():
            logprobs = model.net(ids).logits[0, -1].log_softmax(-1)
        logprobs[[*special, *end_ids(model)]] = -torch.inf
        wanted = model.tokenizer(f"Rome is in {fact.target}").input_ids[-1]
        order = logprobs.argsort(descending=True).tolist()
        assert one.rank == order.index(wanted) + 1
        assert one.logprob == pytest.approx(logprobs[wanted].item(), abs=1e-5)


def test_a_target_of_several_tokens_has_no_rank() -> None:
    with pytest.raises(ValueError, match="several tokens"):
        rank_in_vocabulary(toy(), FACTS[:1])
