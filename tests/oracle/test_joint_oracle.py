"""Joint writes, fast and slow: the same steps, targets and deltas, whatever stands beside a fact in its batch."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from kpatch.edit.first_token import Part
from kpatch.edit.memit import Memit
from kpatch.edit.methods import DEFAULT_BUDGET
from kpatch.edit.presets import MemitHyper
from kpatch.edit.problem import Values
from kpatch.edit.requests import Group, group_facts
from kpatch.edit.solve import KeyCovariance
from kpatch.edit.upwards import write_upwards
from kpatch.edit.values_cache import find_values
from kpatch.facts.derived import unrelated_questions
from kpatch.facts.fact import Fact
from kpatch.models.model import Model
from tests.oracle import joint as oracle
from tests.oracle import memit as paper
from tests.oracle.test_fast_path import CONTEXTS, FACTS
from tests.support.families import KINDS, slow_beyond
from tests.support.models import WIDTH, tiny
from tests.support.tokenizers import byte_level

pytestmark = pytest.mark.usefixtures("one_thread")

HYPER = MemitHyper(layers=(1, 2), steps=5, stop_loss=0.0)
SOME = ["gpt2", "llama", "gemma2", "granite"]  # Conv1D, plain, a norm behind the MLP, a scale behind it
EXPERTS = ["deepseek_v3", "qwen2_moe", "llama4"]  # shared experts; behind a gate; in every other layer, in a wrapper
FEW = ["llama", "gemma2"]  # what happens to a fact beside others differs no further
METHOD = Memit()

build = cache(tiny)


def grouped(model: Model) -> list[Group]:
    return group_facts(model, [Fact(subject, prompt, target) for prompt, subject, target in FACTS], CONTEXTS)


def sought(model: Model, hyper: MemitHyper) -> list[tuple[dict[int, Tensor], list[float]]]:
    return [oracle.find_writes(model, CONTEXTS, group, hyper) for group in paper.by_subject(FACTS)]


@cache
def found(family: str) -> list[tuple[dict[int, Tensor], list[float]]]:
    return sought(build(family), HYPER)


def wanted(model: Model, slow: list[tuple[dict[int, Tensor], list[float]]]) -> list[dict[int, Tensor]]:
    bare = [paper.rows_for(model, [""], group[:1])[0] for group in paper.by_subject(FACTS)]
    return [oracle.targets(model, row, deltas) for row, (deltas, _) in zip(bare, slow, strict=True)]


def assert_same(model: Model, fast: Values, slow: list[tuple[dict[int, Tensor], list[float]]]) -> None:
    assert list(fast.steps) == [len(losses) for _, losses in slow]
    for got, loss, target, (deltas, losses) in zip(fast.values, fast.losses, wanted(model, slow), slow, strict=True):
        assert loss == pytest.approx(losses[-1], rel=1e-4)
        for index, (layer, delta) in enumerate(deltas.items()):
            assert float(delta.norm()) > 0 or len(losses) == 1
            assert float((got[index] - target[layer]).norm()) <= 2e-3 * float(delta.norm()) + 1e-5


@pytest.mark.parametrize("family", slow_beyond(SOME, [*KINDS, *EXPERTS]))
def test_targets_are_the_oracles(family: str) -> None:
    model = build(family)
    assert_same(model, METHOD.objective(HYPER).search(model, grouped(model)), found(family))


@pytest.mark.parametrize("family", slow_beyond(FEW, SOME))
def test_facts_that_converge_leave_the_batch_and_change_nothing(family: str) -> None:
    model = build(family)
    middle = sorted(losses[3] for _, losses in found(family))
    hyper = replace(HYPER, stop_loss=(middle[1] + middle[2]) / 2)
    slow = sought(model, hyper)
    steps = [len(losses) for _, losses in slow]
    assert min(steps) <= 4 < max(steps) == HYPER.steps
    told: list[int] = []
    assert_same(model, METHOD.objective(hyper).search(model, grouped(model), told.append), slow)
    assert sum(told) == len(slow) * hyper.steps


@pytest.mark.parametrize("family", slow_beyond(FEW, SOME))
def test_the_clamp_is_the_oracles(family: str) -> None:
    model, hyper = build(family), replace(HYPER, clamp=0.05)
    slow = sought(model, hyper)
    for (deltas, _), group in zip(slow, paper.by_subject(FACTS), strict=True):
        size = oracle.sizes(model, paper.rows_for(model, [""], group[:1])[0], hyper.layers)
        for layer, delta in deltas.items():
            bound = 0.05 * size[layer] * (2 if model.family.post_norm else 1)
            assert float(delta.norm()) == pytest.approx(bound, rel=1e-4)
    assert_same(model, METHOD.objective(hyper).search(model, grouped(model)), slow)


def test_batches_of_any_size_give_targets_in_the_order_of_the_facts() -> None:
    model, goal = build("llama"), METHOD.objective(HYPER)
    for budget in (1, DEFAULT_BUDGET):
        assert_same(model, find_values(model, grouped(model), goal, budget=budget, keep=False), found("llama"))


@pytest.mark.parametrize("family", slow_beyond(FEW, SOME))
def test_other_questions_are_held_as_the_oracle_holds_them(family: str) -> None:
    model, hyper = build(family), replace(HYPER, kl=4.0)
    facts = [Fact(subject, prompt, target) for prompt, subject, target in FACTS]
    groups = group_facts(model, facts, CONTEXTS, others=2)
    slow = []
    for group, some in zip(groups, paper.by_subject(FACTS), strict=True):
        questions = unrelated_questions([facts[index] for index in group.facts], 2)
        assert len(set(questions)) == 2
        slow.append(oracle.find_writes(model, CONTEXTS, some, hyper, questions))
    assert slow[0][1] != oracle.find_writes(model, CONTEXTS, paper.by_subject(FACTS)[0], hyper)[1]
    for budget in (1, DEFAULT_BUDGET):
        assert_same(model, find_values(model, groups, METHOD.objective(hyper), budget=budget, keep=False), slow)


def test_a_tokenizer_that_adds_a_bos() -> None:
    model = tiny("llama", tokenizer=byte_level(bos=True))
    assert_same(model, METHOD.objective(HYPER).search(model, grouped(model)), sought(model, HYPER))


def covariances(model: Model) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(3)
    roots = {
        layer: torch.randn(model.key_width(layer), 200, generator=generator, dtype=torch.float64)
        for layer in (0, 1, 2)
    }
    return {layer: root @ root.T / 200 for layer, root in roots.items()}


@pytest.mark.parametrize("family", slow_beyond((*SOME, "qwen2_moe"), [*KINDS, *EXPERTS]))
@pytest.mark.parametrize("layers", [(1, 2), (0, 2)])
def test_deltas_are_the_oracles(family: str, layers: tuple[int, ...]) -> None:
    model, hyper = build(family), replace(HYPER, layers=layers)
    groups = grouped(model)
    generator = torch.Generator().manual_seed(5)
    asked = [{layer: 2 * torch.randn(WIDTH, generator=generator) for layer in layers} for _ in groups]
    slow = oracle.joint(model, CONTEXTS, FACTS, hyper, covariances(model), asked)
    values = torch.stack([torch.stack([target[layer] for layer in layers]) for target in asked])
    residual = METHOD.residual(model, Part(tuple(groups), hyper, False), values)
    before = {name: weight.clone() for name, weight in model.net.named_parameters()}
    for budget in (1, DEFAULT_BUDGET):
        fast = write_upwards(
            model,
            groups,
            layers,
            residual,
            lambda layer: KeyCovariance.of(covariances(model)[layer], 1.0),
            apart=METHOD.keys_apart,
            budget=budget,
        )
        assert list(fast.deltas) == list(slow)
        for name, delta in fast.deltas.items():
            want = slow[name].T if model.stores_transposed else slow[name]
            assert float(want.norm()) > 1e-2
            assert float((delta.dense() - want).norm()) <= 1e-5 * float(want.norm())
    assert all(torch.equal(weight, before[name]) for name, weight in model.net.named_parameters())
