"""Refinement, fast and slow: the same residuals after the same steps, in every orientation and form of delta."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch

from kpatch.edit import refine as fast
from kpatch.edit.bystanders import Bystander, Bystanders, answer
from kpatch.edit.methods import DEFAULT_BUDGET
from kpatch.edit.refine import Goal, refine
from kpatch.edit.requests import Group, group_facts
from kpatch.facts.fact import Fact
from kpatch.facts.tokens import encode
from kpatch.models.model import Model
from kpatch.patch.delta import Delta, Dense, LowRank
from tests.oracle import refine as oracle
from tests.oracle.test_fast_path import CONTEXTS, FACTS
from tests.support.families import slow_beyond
from tests.support.models import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

SOME = ["gpt2", "llama", "gemma2", "granite"]  # Conv1D, plain, a norm behind the MLP, a scale behind it
LAYERS = (1, 2)
GOAL = Goal(steps=4, stop_loss=1.0, kl=0.5, hold=2.0)
PACES = [fast._RATE * min(1.0, step / 5) * min(1.0, 2 * (1 - (step - 1) / 4)) for step in (1, 2, 3, 4)]

build = cache(tiny)


class Fixed(Bystanders):
    """The same bystanders in every step."""

    def __init__(self, model: Model, kinds: list[list[Bystander]]) -> None:
        empty = torch.zeros(0, 1)
        super().__init__(model, (), empty, (), (), empty, (), (), random.Random(0), False)
        self.kinds = kinds

    def draw(self, groups: object) -> list[list[Bystander]]:
        return self.kinds


def grouped(model: Model) -> list[Group]:
    return group_facts(model, [Fact(subject, prompt, target) for prompt, subject, target in FACTS], CONTEXTS)


def bystanding(model: Model) -> list[list[Bystander]]:
    text = tuple(model.tokenizer("The old tower stands near the river, and the bridge is long").input_ids)
    spoken = [encode(model.tokenizer, "Near the {} is", name) for name in ("Rome", "Mona Lisa")]
    return [[Bystander(text, 0, tuple(range(1, len(text))))], [answer(row) for row in spoken]]


def written(model: Model, rank: int = 3) -> dict[str, Delta]:
    draws = torch.Generator().manual_seed(5)
    found: dict[str, Delta] = {}
    for layer in LAYERS:
        left = torch.randn(model.width, rank, generator=draws)
        right = torch.randn(rank, model.key_width(layer), generator=draws)
        delta = LowRank(left * 0.3, right * 0.3)
        found[model.weight_name(layer)] = delta.transposed() if model.stores_transposed else delta
    return found


def factors(model: Model, deltas: dict[str, Delta]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    for layer in LAYERS:
        delta = deltas[model.weight_name(layer)]
        assert isinstance(delta, LowRank)
        delta = delta.transposed() if model.stores_transposed else delta
        found[layer] = (delta.left, delta.right)
    return found


@pytest.mark.parametrize("family", slow_beyond(SOME[:2], SOME))
def test_residuals_are_the_oracles(family: str) -> None:
    model = build(family)
    groups, kinds, deltas = grouped(model), bystanding(model), written(model)
    assert len(groups) <= fast._AT_ONCE, "so that every step looks at all of them"
    slow, losses = oracle.refined(
        model, groups, kinds, factors(model, deltas), PACES, fast._BEGIN, GOAL.stop_loss, GOAL.kl, GOAL.hold
    )
    assert losses[-1] < losses[0]
    for budget in (1, DEFAULT_BUDGET):
        found = refine(model, groups, deltas, Fixed(model, kinds), GOAL, seed=0, budget=budget)
        for layer, (left, right) in factors(model, found).items():
            start, fixed = factors(model, deltas)[layer]
            way = float((slow[layer] - fast._BEGIN * start).norm())
            assert torch.equal(right, fixed)
            assert float((left - slow[layer]).norm()) <= 2e-3 * way


def test_a_dense_delta_stays_dense_and_is_refined_along_its_singular_vectors() -> None:
    model = build("llama")
    groups, kinds = grouped(model), bystanding(model)
    deltas: dict[str, Delta] = {name: Dense(delta.dense(torch.float32), 3) for name, delta in written(model).items()}
    svd = {}
    for layer in LAYERS:
        u, s, vh = torch.linalg.svd(deltas[model.weight_name(layer)].dense(), full_matrices=False)
        svd[layer] = ((u * s).float(), vh.float())
    slow, _ = oracle.refined(model, groups, kinds, svd, PACES, fast._BEGIN, GOAL.stop_loss, GOAL.kl, GOAL.hold)
    found = refine(model, groups, deltas, Fixed(model, kinds), GOAL, seed=0, budget=DEFAULT_BUDGET)
    for layer in LAYERS:
        delta = found[model.weight_name(layer)]
        assert isinstance(delta, Dense)
        assert delta.known_rank == 3
        wanted = slow[layer] @ svd[layer][1]
        way = float((wanted - fast._BEGIN * svd[layer][0] @ svd[layer][1]).norm())
        assert float((delta.delta - wanted).norm()) <= 5e-3 * way


def test_a_fact_that_is_met_and_holds_that_weigh_nothing_leave_no_gradient() -> None:
    model = build("llama")
    groups, kinds, deltas = grouped(model), bystanding(model), written(model)
    goal = Goal(steps=2, stop_loss=1e9, kl=0.0, hold=0.0)
    found = refine(model, groups, deltas, Fixed(model, kinds), goal, seed=0, budget=DEFAULT_BUDGET)
    for layer, (left, _) in factors(model, found).items():
        assert torch.allclose(left, fast._BEGIN * factors(model, deltas)[layer][0], rtol=1e-6)
