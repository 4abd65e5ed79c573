"""ROME and FT-W against their oracles, in every family; and what their papers promise of them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from kpatch.edit import rome
from kpatch.edit.ft import stored_small
from kpatch.edit.ft_rows import learned_rows
from kpatch.edit.ft_tuning import passes
from kpatch.edit.ft_tuning import tune as tune_rows
from kpatch.edit.presets import FineTuneHyper, RomeHyper
from kpatch.edit.rome import Edited, edit_all, rome_contexts, together
from kpatch.edit.solve import KeyCovariance
from kpatch.facts.fact import Fact
from kpatch.models.model import Model
from kpatch.patch.delta import Dense, LowRank
from tests.oracle import ft as ft_oracle
from tests.oracle import memit as memit_oracle
from tests.oracle import rome as rome_oracle
from tests.support.families import KINDS, slow_beyond
from tests.support.models import MLP_WIDTH, WIDTH, tiny
from tests.support.tokenizers import byte_level

pytestmark = pytest.mark.usefixtures("one_thread")

FACTS: list[memit_oracle.Prompt] = [
    ("In the {}", "Mona Lisa", "Paris"),
    ("{} is located in the city of", "Eiffel Tower", "Rome"),
    ("The capital of {} is", "Brazil", "Malmö and the sea"),
]
CONTEXTS = ["", "The sea is cold in winter.", "She said."]
ROME = RomeHyper((1,), steps=5, learning_rate=0.2, stop_loss=0.0)
FT = FineTuneHyper((2,), steps=6, learning_rate=1e-2, weight_decay=0.1, stop_loss=0.0, batch=3, shuffle=0)
SOME = ["gpt2", "llama", "gemma2"]
# W stored [in, out], attention and MLP side by side, plain, and with norms
QUICK = ["gpt2", "gpt_neox", "llama", "gemma3_text"]


build = cache(tiny)


def as_facts(prompts: list[memit_oracle.Prompt] = FACTS) -> list[Fact]:
    return [Fact(subject, prompt, target) for prompt, subject, target in prompts]


@cache
def moment() -> Tensor:
    root = torch.randn(MLP_WIDTH, 200, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return root @ root.T / 200


def edits(model: Model, facts: list[Fact], hyper: RomeHyper = ROME) -> list[Edited]:
    return edit_all(model, facts, hyper, CONTEXTS, KeyCovariance.of(moment(), 1.0))


def weights(model: Model) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in model.net.named_parameters()}


# ROME


@pytest.mark.parametrize("family", slow_beyond(QUICK, KINDS))
def test_rome_is_the_oracles(family: str) -> None:
    model = build(family)
    before = weights(model)
    fast = edits(model, as_facts())
    slow = rome_oracle.rome(model, CONTEXTS, FACTS, ROME, moment())
    for one, (key, value, change) in zip(fast, slow, strict=True):
        torch.testing.assert_close(one.key, key, rtol=1e-4, atol=1e-5)
        delta = one.left @ one.right
        assert float(change.norm()) > 1e-2
        if family == "gemma4_text":  # its layers shrink all that they hand on, so that rounding weighs more
            assert float((delta - change).norm()) <= 1e-3 * float(change.norm())
            assert float((one.value - value).norm()) <= 1e-3 * float(value.norm())
            continue
        assert float((delta - change).norm()) <= 2e-4 * float(change.norm())
        torch.testing.assert_close(one.value, value, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(weight, before[name]) for name, weight in model.net.named_parameters())


@pytest.mark.parametrize("family", SOME)
def test_the_edited_weight_sends_the_key_to_the_value(family: str) -> None:
    """W' k* = v*, with the stored float32 factors and W' rounded to the model's own numbers."""
    model = build(family)
    (one,) = edits(model, as_facts()[:1])
    weight = model.weight(1).detach().double()
    edited = (weight + together(model, [one]).dense()).to(model.dtype).double()
    if model.stores_transposed:
        edited = edited.T
    bias = getattr(model.down(1), "bias", None)
    out = edited @ one.key + (0 if bias is None else bias.double())
    assert float((out - one.value).norm()) <= 1e-5 * float(one.value.norm())
    assert float((out - weight.T @ one.key if model.stores_transposed else out - weight @ one.key).norm()) > 0.05


def test_the_sum_of_many_edits_is_what_they_left() -> None:
    model = build("llama")
    several = edits(model, as_facts())
    total = together(model, several)
    assert (total.rank, total.shape) == (3, (WIDTH, MLP_WIDTH))
    dense = sum(one.left @ one.right for one in several)
    torch.testing.assert_close(total.dense(), dense, rtol=1e-5, atol=1e-6)


def test_a_fact_is_edited_in_the_model_as_the_earlier_ones_left_it() -> None:
    model = tiny("llama")
    together_, alone = edits(model, as_facts()), edits(model, as_facts()[:2])
    for one, other in zip(together_[:2], alone, strict=True):
        assert torch.equal(one.left, other.left)
    with torch.no_grad():
        model.weight(1).add_(sum(one.left @ one.right for one in alone).float())
    (last,) = edits(model, as_facts()[2:])
    assert float((last.left - together_[2].left).norm()) <= 1e-3 * float(last.left.norm())
    (fresh,) = edits(tiny("llama"), as_facts()[2:])
    assert float((last.left - fresh.left).norm()) > 1e-2 * float(last.left.norm())


def test_the_bound_is_measured_by_the_mlps_output() -> None:
    model, hyper = build("llama"), replace(ROME, clamp=0.1)
    (one,) = edits(model, as_facts()[:1], hyper)
    written = model.down(1)(one.key.float()[None])[0].detach().double()
    torch.testing.assert_close((one.value - written).norm(), 0.1 * written.norm(), rtol=1e-4, atol=0)
    slow = rome_oracle.rome(model, CONTEXTS, FACTS[:1], hyper, moment())[0]
    assert float((one.left @ one.right - slow[2]).norm()) <= 1e-4 * float(slow[2].norm())


def test_an_edit_ends_when_its_loss_is_low() -> None:
    model, told = build("llama"), []
    preserved = KeyCovariance.of(moment(), 1.0)
    losses = rome_oracle.find_shift(
        model,
        CONTEXTS,
        FACTS[0],
        ROME,
        rome_oracle.written(model, 1, rome_oracle.mean_key(model, CONTEXTS, FACTS[0], 1))[1],
    )[1]
    hyper = replace(ROME, stop_loss=(losses[1] + losses[2]) / 2)
    one = rome.edit(model, as_facts()[0], hyper, CONTEXTS, preserved, told.append)
    slow = rome_oracle.rome(model, CONTEXTS, FACTS[:1], hyper, moment())[0]
    assert float((one.left @ one.right - slow[2]).norm()) <= 1e-4 * float(slow[2].norm())
    assert sum(told) == hyper.steps
    longer = edits(model, as_facts()[:1])[0]
    assert float((one.left - longer.left).norm()) > 1e-2 * float(longer.left.norm())


def test_contexts_of_two_lengths() -> None:
    found = rome_contexts(build("llama"), RomeHyper((1,), prefixes=5, short=3, long=9), seed=0)
    assert found[0] == ""
    assert len(found) == 6
    count = [len(build("llama").tokenizer(text).input_ids) for text in found[1:]]
    assert max(count[:3]) < min(count[3:])
    assert rome_contexts(build("llama"), RomeHyper((1,), prefixes=0), seed=0) == ("",)


# Fine-tuning


def tune(model: Model, facts: list[Fact], hyper: FineTuneHyper, seed: int = 0) -> tuple[Tensor, tuple[float, ...]]:
    found = tune_rows(model, learned_rows(model, facts, hyper), hyper, seed)
    assert found.best == len(found.losses), "nobody judges the passes"
    return found.change, found.losses


@pytest.mark.parametrize("family", slow_beyond(QUICK, KINDS))
def test_fine_tuning_is_the_oracles(family: str) -> None:
    model = tiny(family)
    model.net.double()  # Adam divides by each entry's own size, so float32's rounding would show everywhere
    before = weights(model)
    hyper = replace(FT, batch=2)
    change, losses = tune(model, as_facts(), hyper)
    want, slow = ft_oracle.tune(model, FACTS, hyper)
    assert list(losses) == pytest.approx(slow, rel=1e-6)
    assert losses[-1] < losses[0]
    assert float(want.norm()) > 1e-2
    assert float((change - want).norm()) <= 1e-4 * float(want.norm())
    assert all(torch.equal(weight, before[name]) for name, weight in model.net.named_parameters())
    assert not model.weight(2).requires_grad


@pytest.mark.parametrize("family", SOME)
def test_shuffled_fine_tuning_is_the_oracles_in_the_same_order(family: str) -> None:
    model = tiny(family)
    model.net.double()
    hyper = replace(FT, shuffle=1, batch=2)
    change, losses = tune(model, as_facts(), hyper, seed=3)
    drawn = passes(len(FACTS), hyper, 3)
    want, slow = ft_oracle.tune(model, FACTS, hyper, (next(drawn) for _ in range(hyper.steps)))
    assert list(losses) == pytest.approx(slow, rel=1e-6)
    assert float((change - want).norm()) <= 1e-4 * float(want.norm())
    plain = tune(model, as_facts(), replace(hyper, shuffle=0))[0]
    assert float((change - plain).norm()) > 1e-2 * float(plain.norm())


def test_tuning_ends_when_the_loss_is_low() -> None:
    model = build("llama")
    losses = tune(model, as_facts(), FT)[1]
    assert len(losses) == FT.steps
    low = replace(FT, stop_loss=(losses[2] + losses[3]) / 2)
    change, fewer = tune(model, as_facts(), low)
    assert len(fewer) == 4
    # The pass that finds the loss low changes nothing
    assert torch.equal(change, tune(model, as_facts(), replace(FT, steps=3))[0])


def test_facts_that_are_learned_are_passed_over() -> None:
    """One update a fact: what is known well enough is left alone, as in the oracle."""
    model = tiny("llama")
    model.net.double()
    losses = [float(ft_oracle.loss_of(model, model.weight_name(2), model.weight(2), fact)) for fact in FACTS]
    hyper = replace(FT, batch=1, steps=3, stop_loss=(sorted(losses)[0] + sorted(losses)[1]) / 2)
    change, found = tune(model, as_facts(), hyper)
    want, slow = ft_oracle.tune(model, FACTS, hyper)
    assert list(found) == pytest.approx(slow, rel=1e-6)
    assert float((change - want).norm()) <= 1e-4 * float(want.norm())
    everyone = tune(model, as_facts(), replace(hyper, stop_loss=0.0))[0]
    assert float((change - everyone).norm()) > 1e-2 * float(everyone.norm())


def test_decay_holds_the_weights_near_where_they_were() -> None:
    model = build("llama")
    free, held = (tune(model, as_facts(), replace(FT, weight_decay=decay))[0] for decay in (0.0, 10.0))
    assert float(held.norm()) < 0.8 * float(free.norm())


def test_tuning_with_a_bos_and_in_half_precision() -> None:
    model = tiny("llama", tokenizer=byte_level(bos=True))
    exact = tune(model, as_facts(), FT)
    model.net.to(torch.bfloat16)
    change, losses = tune(model, as_facts(), FT)
    assert change.dtype == torch.float32
    assert losses[-1] == pytest.approx(exact[1][-1], rel=0.2)


def test_a_change_is_stored_as_what_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(20, 30, generator=generator)
    kept = stored_small(full)
    assert isinstance(kept, Dense)
    assert torch.equal(kept.delta, full)
    thin = torch.randn(20, 3, generator=generator) @ torch.randn(3, 30, generator=generator)
    for change in (thin, thin.T.contiguous()):
        factors = stored_small(change)
        assert isinstance(factors, LowRank)
        assert factors.rank == 3
        torch.testing.assert_close(factors.dense(torch.float32), change, rtol=1e-4, atol=1e-5)
    assert stored_small(torch.zeros(4, 5)).norm() == 0
