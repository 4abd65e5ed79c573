"""Subjects that open a text: their own groups and layer, and the share of the way that they are sure to go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from types import MappingProxyType

import pytest
import torch
from torch import Tensor

from kpatch.edit.first_token import Part, key_covariances, opening_moment, split
from kpatch.edit.memit_paper import MemitPaper, paper_residual
from kpatch.edit.presets import MemitPaperHyper
from kpatch.edit.requests import Group, group_facts
from kpatch.edit.solve import KeyCovariance, key_covariance
from kpatch.edit.upwards import Update, write_upwards
from kpatch.edit.values import optimize
from kpatch.edit.weights import add, restored
from kpatch.facts.fact import Fact
from kpatch.models.model import Model
from kpatch.stats.covariance import Covariance
from kpatch.stats.moment import SecondMoment
from kpatch.stats.self_text import opening_words
from tests.oracle import memit as oracle
from tests.support.models import MLP_WIDTH, WIDTH, tiny
from tests.support.tokenizers import byte_level

CONTEXTS = ("", "The sea is cold in winter.", "She said.")
HYPER = MemitPaperHyper(layers=(1, 2), first_layer=0, steps=4, covariance_weight=1.0)
# "The" and "She" are one token where a text begins; "In the Mona Lisa" has its subject behind other words
ONE, OTHER = Fact("The", "{} is in", "Paris"), Fact("She", "{} lives in", "Rome")
INSIDE = Fact("The", "Past {} is", "Rome")
LONG = Fact("Mona Lisa", "In the {}", "Paris")
build = cache(tiny)
Build = Callable[[int, Tensor], KeyCovariance]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def grouped(model: Model, *facts: Fact, contexts: Sequence[str] = CONTEXTS) -> list[Group]:
    return group_facts(model, facts, contexts)


def covariance(*layers: int) -> Covariance:
    moments = {}
    for layer in layers:
        moments[layer] = SecondMoment(MLP_WIDTH)
        moments[layer].add(torch.randn(500, MLP_WIDTH, generator=torch.Generator().manual_seed(layer)))
    return Covariance("00", "self", 500, moments)


def test_a_subject_that_opens_some_rows_has_a_group_for_those() -> None:
    groups = grouped(build("llama"), ONE, LONG)
    assert [(group.subject, group.first, group.facts, len(group.rows)) for group in groups] == [
        ("The", True, (0,), 1),
        ("The", False, (0,), 2),
        ("Mona Lisa", False, (1,), 3),
    ]
    assert [group.contexts for group in groups] == [(0,), (1, 2), (0, 1, 2)]
    opening, rest, _ = groups
    assert opening.rows[0].subject_last == opening.drifts[0].subject_last == 0
    assert all(row.subject_last > 0 for row in (*rest.rows, *rest.drifts))


def test_the_bare_row_of_a_subject_is_without_context_where_it_can_be() -> None:
    opening, rest = grouped(build("llama"), ONE, INSIDE)
    assert (len(opening.rows), len(rest.rows)) == (1, 5)
    assert build("llama").tokenizer.decode(rest.rows[rest.bare].ids) == "Past The is Rome"
    assert opening.facts == rest.facts == (0, 1)


def test_behind_a_bos_no_subject_opens_a_text() -> None:
    groups = grouped(tiny("llama", tokenizer=byte_level(bos=True)), ONE, LONG)
    assert [(group.first, len(group.rows)) for group in groups] == [(False, 3), (False, 3)]


def test_split_puts_opening_subjects_first_and_into_their_layer() -> None:
    groups = grouped(build("llama"), LONG, ONE)
    first, others = split(groups, HYPER)
    assert (first.first, others.first) == (True, False)
    assert first.groups == (groups[1],)
    assert others.groups == (groups[0], groups[2])
    assert first.hyper == replace(HYPER, layers=(0,))
    assert others.hyper == HYPER
    assert (first.least_leverage, others.least_leverage) == (HYPER.first_leverage, 0.0)
    assert [part.first for part in split(groups[:1], HYPER)] == [False]
    assert [part.first for part in split(groups[1:2], HYPER)] == [True]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_opening_moment_is_the_mean_over_words_alone(family: str) -> None:
    model = build(family)
    keys: list[Tensor] = []
    handle = model.down(1).register_forward_pre_hook(lambda _, args: keys.append(args[0].reshape(-1).double()))
    words = opening_words(model)
    for word in words.tolist():
        oracle.forward(model, [word])
    handle.remove()
    want = torch.stack([torch.outer(key, key) for key in keys]).mean(0)
    assert len(keys) == len(words) > 10
    torch.testing.assert_close(opening_moment(model, 1), want, rtol=1e-4, atol=1e-6)


def test_words_that_open_texts_are_preserved_for_the_opening_part_only() -> None:
    model, texts = build("llama"), covariance(0, 1, 2)
    first, others = split(grouped(model, LONG, ONE), HYPER)
    mean = texts.moments[0].mean()
    kept = key_covariances(model, first, texts, nothing, weighted())(0)
    torch.testing.assert_close(kept.factor @ kept.factor.T, mean + opening_moment(model, 0))
    other = torch.eye(MLP_WIDTH, dtype=torch.float64)
    earlier = {1: torch.randn(MLP_WIDTH, 2, generator=torch.Generator().manual_seed(0))}
    preserved = key_covariances(
        model, others, texts, lambda layer: other if layer == 2 else None, weighted(1.0, earlier)
    )
    both = {layer: preserved(layer) for layer in (1, 2)}
    more = (earlier[1] @ earlier[1].T).double()
    torch.testing.assert_close(both[1].factor @ both[1].factor.T, texts.moments[1].mean() + more)
    torch.testing.assert_close(both[2].factor @ both[2].factor.T, texts.moments[2].mean() + other)


def weighted(weight: float = 1.0, earlier: Mapping[int, Tensor] = MappingProxyType({})) -> Build:
    """C = λ E[k k^T] + Σ K_p K_p^T with one λ for every layer."""
    return lambda layer, mean: key_covariance(layer, mean, weight, earlier.get(layer))


def nothing(layer: int) -> None:
    """No moment is added to that of text."""


def written(model: Model, part: Part, z: Tensor, preserved: Callable[[int], KeyCovariance]) -> Update:
    layers = part.hyper.layers
    return write_upwards(
        model,
        part.groups,
        layers,
        paper_residual(model, layers, z),
        preserved,
        top=max(layers),
        budget=10**8,
        least_leverage=part.least_leverage,
    )


def opened(model: Model, part: Part) -> Tensor:
    """h^0 [n, d] of the part's bare rows."""
    return torch.stack([oracle.state(model, group.rows[group.bare], 0).double() for group in part.groups])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("weight", [1.0, 1e3])
def test_one_opening_subject_goes_the_share_that_its_leverage_gives_it(family: str, weight: float) -> None:
    """With q the larger of its own leverage and the least one, it goes q / (1 + q) of its way."""
    model = build(family)
    (part,) = split(grouped(model, ONE, contexts=[""]), replace(HYPER, covariance_weight=weight))
    preserved = key_covariances(model, part, covariance(0), nothing, weighted(part.hyper.covariance_weight))
    before = opened(model, part)
    z = before + torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1))
    key = oracle.key(model, part.groups[0].rows[0], 0)
    own = float(preserved(0).leverage(key[:, None]))
    q = max(own, part.least_leverage)
    assert (own < part.least_leverage) == (weight > 1)
    update = written(model, part, z.float(), preserved)
    torch.testing.assert_close(update.keys[0], key[None], rtol=1e-4, atol=1e-5)
    with restored(model, [model.weight_name(0)]):
        add(model, model.weight_name(0), update.deltas[model.weight_name(0)])
        after = opened(model, part)
    torch.testing.assert_close(after, before + (z - before) * q / (1 + q), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_opening_subjects_together_come_near_their_values(family: str) -> None:
    model = build(family)
    part = split(grouped(model, ONE, OTHER, LONG), HYPER)[0]
    z = optimize(model, part.groups, MemitPaper().objective(part.hyper)).values[:, 0]
    preserved = key_covariances(model, part, covariance(0), nothing, weighted(part.hyper.covariance_weight))
    update = written(model, part, z, preserved)
    assert list(update.deltas) == [model.weight_name(0)]
    before = opened(model, part)
    with restored(model, [model.weight_name(0)]):
        add(model, model.weight_name(0), update.deltas[model.weight_name(0)])
        after = opened(model, part)
    assert torch.equal(opened(model, part), before)
    assert ((after - z).norm(dim=1) < 0.5 * (before - z).norm(dim=1)).all()
