"""Which facts a model knows, how many were tried, and how strong its noise is."""

from __future__ import annotations

import random

import pytest
import torch

from kpatch.errors import BadInput, CheckFailed
from kpatch.facts.fact import Fact
from kpatch.trace.cells import Traced
from kpatch.trace.known import ask_one, find_known, subject_items, tokens_of
from kpatch.trace.noise import draw, spread_of_embeddings
from tests.support.models import tiny
from tests.support.tokenizers import byte_level, metaspace
from tests.support.tracing import known_facts, model_of

WRONG = Fact("Chicago", "{} stands on the shore of", "xylophone", id="wrong")


def mixed(wrong: int = 40) -> list[Fact]:
    return [*known_facts(), *(Fact(f"Town {n}", "{} lies in", "xylophone", id=f"w{n}") for n in range(wrong))]


def test_only_facts_that_are_predicted_are_kept() -> None:
    found = find_known(model_of(), mixed())
    assert found.tried == len(known_facts()) + 40
    assert sorted(known.fact.id for known in found.known) == sorted(fact.id for fact in known_facts())
    for known in found.known:
        assert known.answer == known.fact.target
        logits = model_of().net(input_ids=torch.tensor([known.item.ids])).logits[0, -1]
        assert int(logits.argmax()) == known.item.answer


def test_the_limit_stops_the_trying_and_the_seed_draws() -> None:
    facts = mixed()
    whole = find_known(model_of(), facts, seed=5)
    order = list(range(len(facts)))
    random.Random(5).shuffle(order)
    knows = {known.fact.id for known in whole.known}
    for limit in (1, 2, len(knows), len(knows) + 7):
        found = find_known(model_of(), facts, limit, seed=5)
        assert [known.fact.id for known in found.known] == [known.fact.id for known in whole.known][:limit]
        tried = count = 0
        for index in order:
            if count < limit:
                tried += 1
                count += facts[index].id in knows
        assert found.tried == tried
    others = {tuple(k.fact.id for k in find_known(model_of(), facts, 2, seed=seed).known) for seed in range(6)}
    assert len(others) > 1


def test_an_edited_fact_counts_with_its_old_object() -> None:
    fact = known_facts()[0]
    edited = Fact(fact.subject, fact.prompt, "xylophone", was=fact.target)
    found = find_known(model_of(), [edited])
    assert [known.answer for known in found.known] == [fact.target]


def test_none_known() -> None:
    with pytest.raises(CheckFailed, match="none of the 1 facts") as caught:
        find_known(model_of(), [WRONG])
    assert caught.value.exit_code == 1


def test_one_prompt_is_traced_for_the_models_own_answer() -> None:
    known = ask_one(model_of(), "The {} is in", " Eiffel Tower")
    logits = model_of().net(input_ids=torch.tensor([known.item.ids])).logits[0, -1]
    assert known.item.answer == int(logits.argmax())
    assert known.fact.text() == "The Eiffel Tower is in"
    tokens = tokens_of(model_of(), known.item)
    assert "".join(tokens) == "The Eiffel Tower is in"
    assert "".join(tokens[known.item.first : known.item.last + 1]).strip() == "Eiffel Tower"
    with pytest.raises(BadInput, match="not in the prompt"):
        ask_one(model_of(), "The Louvre is in", "Eiffel Tower")


def test_a_leading_special_token_is_no_part_of_the_subject() -> None:
    model = tiny("llama", tokenizer=metaspace())
    known = ask_one(model, "{} is in", "Chicago")
    assert known.item.first == 1
    assert tokens_of(model, known.item)[0] == "<s>"


def test_a_prompt_too_long_for_the_model() -> None:
    with pytest.raises(BadInput, match="too long for tiny-gpt2") as caught:
        ask_one(model_of("gpt2"), "{} is in" + " and in the city" * 60, "Chicago")
    assert "expected at most 128 tokens" in caught.value.details[0]


def test_a_model_that_gives_nan() -> None:
    model = tiny("llama")
    model.net.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(CheckFailed, match="NaN"):
        find_known(model, [WRONG])


# Noise


def test_sigma_is_the_spread_of_all_subject_tokens_embeddings() -> None:
    model = model_of()
    facts = [Fact("Chicago", "{} is in", "x"), Fact("the Eiffel Tower", "They saw {} in", "x")]
    rows = []
    for fact in facts:
        for item in subject_items(model, [fact]):
            rows += item.ids[item.first : item.last + 1]
    assert len(rows) > 2
    want = model.net.get_input_embeddings().weight[rows].double().std()
    assert spread_of_embeddings(model, subject_items(model, facts)) == pytest.approx(float(want))


def test_embeddings_without_spread() -> None:
    model = tiny("llama", tokenizer=byte_level())
    model.net.get_input_embeddings().weight.fill_(0.5)
    with pytest.raises(CheckFailed, match="no spread"):
        spread_of_embeddings(model, subject_items(model, [WRONG]))


def test_noise_is_gaussian_and_seeded_by_the_prompt() -> None:
    model = model_of()
    item = Traced((5, 6, 7, 8), 1, 2, 3)
    noise = draw(model, item, 0.7, 500, seed=1)
    assert noise.shape == (500, 2, 32)
    assert float(noise.std()) == pytest.approx(0.7, rel=0.02)
    assert abs(float(noise.mean())) < 0.01
    assert torch.equal(noise, draw(model, item, 0.7, 500, seed=1))
    assert torch.allclose(2 * noise, draw(model, item, 1.4, 500, seed=1))
    for other in (draw(model, item, 0.7, 500, 2), draw(model, Traced((5, 6, 7, 9), 1, 2, 3), 0.7, 500, 1)):
        assert not torch.allclose(noise, other)
    assert torch.equal(noise, draw(model, Traced(item.ids, 1, 2, 9), 0.7, 500, 1)), "the answer has no part in it"
