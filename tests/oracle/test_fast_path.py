"""The fast path against the oracle: the same steps, values and deltas, whatever stands beside a fact in its batch."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from kpatch.edit.memit_paper import MemitPaper, paper_residual
from kpatch.edit.norms import norm_gain
from kpatch.edit.presets import MemitPaperHyper
from kpatch.edit.problem import Values
from kpatch.edit.requests import Group, group_facts
from kpatch.edit.solve import KeyCovariance
from kpatch.edit.upwards import write_upwards
from kpatch.edit.values import optimize
from kpatch.edit.values_cache import DEFAULT_BUDGET, find_values, plan
from kpatch.facts.fact import Fact
from kpatch.models.families import FAMILIES
from kpatch.models.model import Model
from tests.oracle import memit as oracle
from tests.support.families import KINDS, slow_beyond
from tests.support.models import MLP_WIDTH, WIDTH, tiny
from tests.support.tokenizers import byte_level

pytestmark = pytest.mark.usefixtures("one_thread")

# No subject is one token at the start of a text; widths differ; two facts share a subject, apart in the list; and
# every target is within reach of a small window, since without a gradient Adam follows the rounding.
FACTS: list[oracle.Prompt] = [
    ("In the {}", "Mona Lisa", "Paris"),
    ("{} is located in the city of", "Eiffel Tower", "Rome"),
    ("The capital of {} is", "Brazil", "Malmö and the sea"),
    ("Past the {} there is", "Eiffel Tower", "Paris"),
    ("In winter the {} was by", "Moonlight Sonata", "Beethoven"),
]
CONTEXTS = ["", "The sea is cold in winter.", "She said."]
HYPER = MemitPaperHyper(layers=(1, 2), steps=6, learning_rate=0.2, covariance_weight=1.0)
# Conv1D, plain, and norms after the MLP with softcapped logits
SOME = slow_beyond(["llama", "gemma3_text"], ["gpt2", "llama", "gemma2", "gemma3_text"])
# Those whose oracle a plain `pytest` runs: W stored [in, out], attention and MLP side by side, plain, and with norms
QUICK = ["gpt2", "gpt_neox", "llama", "gemma3_text"]


objective_of = MemitPaper().objective
build = cache(tiny)


def grouped(model: Model, facts: list[oracle.Prompt] = FACTS) -> list[Group]:
    return group_facts(model, [Fact(subject, prompt, target) for prompt, subject, target in facts], CONTEXTS)


@cache
def found(family: str) -> list[tuple[Tensor, Tensor, list[float]]]:
    """The oracle's values of FACTS when nothing converges."""
    return sought(build(family), replace(HYPER, stop_loss=0.0))


def sought(model: Model, hyper: MemitPaperHyper) -> list[tuple[Tensor, Tensor, list[float]]]:
    return [oracle.find_value(model, CONTEXTS, group, hyper, 2) for group in oracle.by_subject(FACTS)]


def assert_same(fast: Values, slow: list[tuple[Tensor, Tensor, list[float]]]) -> None:
    assert list(fast.steps) == [len(losses) for _, _, losses in slow]
    for z, loss, (want, h, losses) in zip(fast.values[:, 0], fast.losses, slow, strict=True):
        assert loss == pytest.approx(losses[-1], rel=1e-4)
        moved = float((want - h).norm())
        assert moved > 0.03 * float(h.norm()) or len(losses) == 1
        assert float((z - want).norm()) <= 1e-4 * moved + 1e-6 * float(h.norm())


@pytest.mark.parametrize("family", slow_beyond(QUICK, KINDS))
def test_values_are_the_oracles(family: str) -> None:
    groups = grouped(build(family))
    assert [group.facts for group in groups] == [(0,), (1, 3), (2,), (4,)]
    assert len({group.columns for group in groups}) > 2
    assert_same(optimize(build(family), groups, objective_of(replace(HYPER, stop_loss=0.0))), found(family))


@pytest.mark.parametrize("family", SOME)
def test_facts_that_converge_leave_the_batch_and_change_nothing(family: str) -> None:
    model = build(family)
    # Between the losses that two of the facts reach half way, so that some end early and some never
    middle = sorted(losses[3] for _, _, losses in found(family))
    hyper = replace(HYPER, stop_loss=(middle[1] + middle[2]) / 2)
    slow = sought(model, hyper)
    steps = [len(losses) for _, _, losses in slow]
    assert min(steps) <= 4 < max(steps) == HYPER.steps
    told: list[int] = []
    assert_same(optimize(model, grouped(model), objective_of(hyper), told.append), slow)
    assert sum(told) == len(slow) * hyper.steps


def test_the_clamp_is_the_oracles() -> None:
    hyper = replace(HYPER, stop_loss=0.0, clamp=0.05)
    slow = sought(build("llama"), hyper)
    fast = optimize(build("llama"), grouped(build("llama")), objective_of(hyper))
    assert_same(fast, slow)
    for z, (_, h, _) in zip(fast.values[:, 0], slow, strict=True):
        torch.testing.assert_close((z - h).norm(), 0.05 * h.norm(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", SOME)
def test_a_fact_alone_and_in_company_are_the_same(family: str) -> None:
    model, groups = build(family), grouped(build(family))
    hyper = replace(HYPER, stop_loss=0.0)
    together = optimize(model, groups, objective_of(hyper))
    for index, group in enumerate(groups):
        alone = optimize(model, [group], objective_of(hyper))
        moved = (together.values[index, 0] - found(family)[index][1]).norm()
        assert float((alone.values[0, 0] - together.values[index, 0]).norm()) <= 1e-4 * float(moved)


def test_batches_of_any_size_give_values_in_the_order_of_the_facts() -> None:
    model, groups = build("llama"), grouped(build("llama"))
    hyper = replace(HYPER, stop_loss=0.0)
    assert len(plan(model, groups, 3, budget=1)) == len(groups)
    assert [len(batch) for batch in plan(model, groups, 3)] == [len(groups)]
    for budget in (1, DEFAULT_BUDGET):
        assert_same(find_values(model, groups, objective_of(hyper), budget=budget, keep=False), found("llama"))


def test_a_tokenizer_that_adds_a_bos() -> None:
    model = tiny("llama", tokenizer=byte_level(bos=True))
    hyper = replace(HYPER, stop_loss=0.0)
    assert_same(optimize(model, grouped(model), objective_of(hyper)), sought(model, hyper))


def moments() -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(3)
    roots = {layer: torch.randn(MLP_WIDTH, 200, generator=generator, dtype=torch.float64) for layer in (0, 1, 2)}
    return {layer: root @ root.T / 200 for layer, root in roots.items()}


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        pytest.param(family, layers, marks=[] if family in quick else [pytest.mark.slow])
        for layers, quick in (((1, 2), QUICK), ((0, 2), ["llama"]))
        for family in KINDS
    ],
)
def test_deltas_are_the_oracles(family: str, layers: tuple[int, ...]) -> None:
    model, hyper = build(family), replace(HYPER, layers=layers)
    groups = grouped(model)
    generator = torch.Generator().manual_seed(5)
    values = [h + 0.7 * torch.randn(WIDTH, generator=generator) for _, h, _ in found(family)]
    earlier = {layers[0]: torch.randn(MLP_WIDTH, 2, generator=generator)}
    slow = oracle.memit(model, CONTEXTS, FACTS, hyper, moments(), values=values, earlier=earlier)
    preserved = {
        layer: KeyCovariance.of(moments()[layer], hyper.covariance_weight, earlier=earlier.get(layer))
        for layer in layers
    }
    before = {name: weight.clone() for name, weight in model.net.named_parameters()}
    for budget in (1, DEFAULT_BUDGET):  # one group at a time, and all at once
        residual = paper_residual(model, hyper.layers, torch.stack(values))
        fast = write_upwards(
            model, groups, hyper.layers, residual, preserved.__getitem__, top=max(hyper.layers), budget=budget
        )
        assert list(fast.deltas) == list(slow)
        for name, delta in fast.deltas.items():
            want = slow[name].T if model.stores_transposed else slow[name]
            assert delta.shape == model.net.get_parameter(name).shape
            assert float(want.norm()) > 1e-2
            assert float((delta.dense() - want).norm()) <= 1e-5 * float(want.norm())
        for index, group in enumerate(oracle.by_subject(FACTS)):
            want = oracle.keys(model, CONTEXTS, group, layers[0]).float()
            torch.testing.assert_close(fast.keys[layers[0]][index], want, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(weight, before[name]) for name, weight in model.net.named_parameters())


@pytest.mark.parametrize("family", [name for name in KINDS if FAMILIES[name].post_norm])
def test_the_gain_is_the_oracles(family: str) -> None:
    norm = build(family).mlp_out(1)
    gain, eps = norm_gain(norm, WIDTH, torch.device("cpu"))
    want, want_eps = oracle.norm_parts(norm)
    assert eps == want_eps
    torch.testing.assert_close(gain.double(), want, rtol=1e-6, atol=1e-7)
