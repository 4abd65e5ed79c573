"""The oracle itself: cases solved by hand, finite differences, and models that really go where they were sent."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kpatch.edit.presets import MemitPaperHyper
from kpatch.facts.tokens import Encoded, encode
from kpatch.models.families import FAMILIES
from kpatch.models.model import Model, wrap
from tests.oracle import memit as oracle
from tests.support.families import KINDS, REPRESENTATIVE, slow_beyond
from tests.support.models import MLP_WIDTH, WIDTH, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

FACTS = [
    ("{} is located in the city of", "Eiffel Tower", "Rome"),
    ("The capital of {} is", "Brazil", "Malmö"),
    ("The painter of the {} was", "Mona Lisa", "Beethoven"),
]
# In a random model a subject is heard best by the very next token
LOUD = [("The city of {}", "Brazil", "Rome"), ("In the {}", "Mona Lisa", "Paris"), ("Past {}", "Brazil", "Rome")]
CONTEXTS = ["", "The sea is cold in winter.", "She said."]
HYPER = MemitPaperHyper(layers=(1, 2), steps=8, learning_rate=0.2, covariance_weight=1e-7)
POST_NORM = [name for name in KINDS if FAMILIES[name].post_norm]
PLAIN = [name for name in KINDS if not FAMILIES[name].post_norm]


build = cache(tiny)


def identity(*layers: int) -> dict[int, Tensor]:
    return {layer: torch.eye(MLP_WIDTH, dtype=torch.float64) for layer in layers}


def edited(model: Model, deltas: dict[str, Tensor]) -> Model:
    """A copy of the model with the deltas added by name, as a patched checkpoint has them."""
    net = copy.deepcopy(model.net)
    weights = dict(net.named_parameters())
    with torch.no_grad():
        for name, delta in deltas.items():
            weights[name].add_((delta.T if model.stores_transposed else delta).float())
    return wrap(net, model.tokenizer, model.family)


def bare_state(model: Model, fact: oracle.Prompt, layer: int) -> Tensor:
    return oracle.state(model, oracle.rows_for(model, [""], [fact])[0], layer).double()


# The solve


def test_one_fact_by_hand() -> None:
    """C = I and k = (1, 2, 2): (I + k k^T)^{-1} k = k / 10."""
    k, r = torch.tensor([[1.0], [2.0], [2.0]]), torch.tensor([[10.0], [-20.0]])
    got = oracle.solve(k, r, torch.eye(3))
    assert got.dtype == torch.float64
    want = torch.tensor([[1.0, 2.0, 2.0], [-2.0, -4.0, -4.0]], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)


def test_two_facts_by_hand() -> None:
    """K = (e1, e2) and C = diag(1, 3, 5): the sum is diag(2, 4, 5); C's entries off the keys must not matter."""
    k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    r = torch.tensor([[2.0, 4.0], [6.0, 8.0]])
    got = oracle.solve(k, r, torch.diag(torch.tensor([1.0, 3.0, 5.0])))
    want = torch.tensor([[1.0, 1.0, 0.0], [3.0, 2.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-15)


def test_the_solve_is_the_minimum_of_its_objective() -> None:
    """Δ minimizes ‖Δ K − R‖² + tr(Δ C Δ^T): the gradient vanishes there (eq. 9 to 14 of the paper)."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(7, 9, generator=generator, dtype=torch.float64)
    k, r = torch.randn(7, 3, generator=generator).double(), torch.randn(4, 3, generator=generator).double()
    c = root @ root.T
    delta = oracle.solve(k, r, c).requires_grad_()
    ((delta @ k - r).square().sum() + (delta @ c @ delta.T).trace()).backward()
    assert delta.grad is not None
    assert delta.grad.abs().max() < 1e-12
    assert delta.abs().max() > 1e-3


# Values


def double(family: str) -> Model:
    model = tiny(family)
    return wrap(model.net.double(), model.tokenizer)


def problem(model: Model, layer: int) -> tuple[list[Encoded], Encoded, Tensor, Tensor]:
    rows = oracle.rows_for(model, CONTEXTS, FACTS[1:2])
    drift = encode(model.tokenizer, "{} is a", FACTS[1][1])
    before = oracle.forward(model, drift.ids).log_softmax(-1)[-1].detach()
    return rows, drift, before, oracle.state(model, rows[0], layer)


@pytest.mark.parametrize("family", ["gpt2", "phi", "opt"])
def test_the_gradient_is_the_finite_difference(family: str) -> None:
    model = double(family)
    rows, drift, before, h = problem(model, 2)
    generator = torch.Generator().manual_seed(4)
    start = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    # Weights so large that a mistake in one of the terms cannot hide
    hyper = replace(HYPER, kl=2.0, weight_decay=50.0)

    def loss(delta: Tensor) -> Tensor:
        return oracle.objective(model, rows, drift, before, h, delta, hyper, 2)

    delta = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(delta), delta)
    for _ in range(4):
        direction = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
        step = 1e-5 * direction
        with torch.no_grad():
            slope = (loss(start + step) - loss(start - step)) / 2e-5
        torch.testing.assert_close(gradient @ direction, slope, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_the_objective_without_delta_is_the_plain_loss() -> None:
    model = double("gpt2")
    rows, drift, before, h = problem(model, 2)
    got = oracle.objective(model, rows, drift, before, h, torch.zeros_like(h), HYPER, 2)
    losses = []
    for context in CONTEXTS:
        text = (f"{context} " if context else "") + FACTS[1][0].replace("{}", FACTS[1][1])
        prompt = model.tokenizer(text).input_ids
        target = model.tokenizer(" " + FACTS[1][2]).input_ids
        assert len(target) > 1
        logits = model.net(input_ids=torch.tensor([prompt + target])).logits[0]
        losses.append(F.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(target)))
    torch.testing.assert_close(got, torch.stack(losses).mean())


@torch.no_grad()
def test_drift_and_decay_are_those_of_the_public_code() -> None:
    model = double("gpt2")
    rows, drift, before, h = problem(model, 1)
    delta = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(kl: float = 0.0, weight_decay: float = 0.0) -> Tensor:
        hyper = replace(HYPER, kl=kl, weight_decay=weight_decay)
        return oracle.objective(model, rows, drift, before, h, delta, hyper, 1)

    def add(_: object, args: object, out: Tensor) -> Tensor:
        out = out.clone()
        out[0, drift.subject_last] += delta
        return out

    handle = model.layer(1).register_forward_hook(add)
    logits = model.net(input_ids=torch.tensor([drift.ids])).logits[0]
    handle.remove()
    after = logits[-1:].log_softmax(-1)
    kl = F.kl_div(before[None], after, log_target=True, reduction="batchmean")
    assert kl > 1e-3
    torch.testing.assert_close(loss(kl=1.0) - loss(), kl)
    torch.testing.assert_close(loss(weight_decay=1.0) - loss(), delta.norm() / h.square().sum())


@pytest.mark.parametrize("family", slow_beyond(REPRESENTATIVE, KINDS))
def test_the_search_lowers_the_loss_within_its_ball(family: str) -> None:
    model = build(family)
    hyper = replace(HYPER, steps=10, clamp=0.6)
    z, h, losses = oracle.find_value(model, CONTEXTS, LOUD[:1], hyper, 2)
    assert len(losses) == 10
    assert losses[-1] < 0.9 * losses[0]  # softcapped logits leave little room
    assert 0 < (z - h).norm() <= 0.6 * h.norm() * (1 + 1e-5)
    torch.testing.assert_close(h.double(), bare_state(model, LOUD[0], 2))


def test_iterations_stop_where_they_should() -> None:
    model = build("llama")
    z, h, losses = oracle.find_value(model, [""], FACTS[:1], replace(HYPER, steps=1), 2)
    assert len(losses) == 1
    assert torch.equal(z, h)  # the last iteration takes no step
    _, _, losses = oracle.find_value(model, [""], FACTS[:1], replace(HYPER, stop_loss=losses[0] + 1), 2)
    assert len(losses) == 1
    z, h, losses = oracle.find_value(model, [""], FACTS[:1], replace(HYPER, steps=2, clamp=1e9), 2)
    assert len(losses) == 2
    # Adam's first step has the size of the learning rate in every coordinate
    torch.testing.assert_close((z - h).abs(), torch.full((WIDTH,), HYPER.learning_rate), rtol=1e-3, atol=0)
    z, h, _ = oracle.find_value(model, [""], FACTS[:1], replace(HYPER, steps=2, clamp=0.01), 2)
    torch.testing.assert_close((z - h).norm(), 0.01 * h.norm())


def test_facts_about_one_subject_share_a_value() -> None:
    model = build("llama")
    both = [FACTS[0], ("{} stands in", "Eiffel Tower", "Paris")]
    _, _, losses = oracle.find_value(model, CONTEXTS, both, replace(HYPER, steps=1), 2)
    alone = [oracle.find_value(model, CONTEXTS, [fact], replace(HYPER, steps=1), 2)[2][0] for fact in both]
    assert losses[0] == pytest.approx(sum(alone) / 2, rel=1e-5)
    assert oracle.by_subject([*both, FACTS[1], FACTS[0]]) == [[*both, FACTS[0]], [FACTS[1]]]


# Keys and the update


@torch.no_grad()
@pytest.mark.parametrize("family", slow_beyond(REPRESENTATIVE, KINDS))
def test_the_key_is_what_the_projection_multiplies(family: str) -> None:
    model = build(family)
    rows = oracle.rows_for(model, CONTEXTS, FACTS[1:2])
    assert len({row.subject_last for row in rows}) == 3
    mean = oracle.keys(model, CONTEXTS, FACTS[1:2], 1)
    written = []
    handle = model.down(1).register_forward_hook(lambda _, args, out: written.append(out.reshape(-1, WIDTH).clone()))
    for row in rows:
        oracle.forward(model, row.ids)
    handle.remove()
    bare, *others = [out[row.subject_last] for out, row in zip(written, rows, strict=True)]
    want = (bare + torch.stack(others).mean(0)) / 2
    torch.testing.assert_close(model.down(1)(mean.float()), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", PLAIN)
def test_with_little_to_preserve_every_subject_arrives_at_its_value(family: str) -> None:
    model = build(family)
    generator = torch.Generator().manual_seed(2)
    values = [bare_state(model, fact, 2) + torch.randn(WIDTH, generator=generator) for fact in FACTS]
    before = {name: weight.clone() for name, weight in model.net.named_parameters()}
    deltas = oracle.memit(model, [""], FACTS, HYPER, identity(1, 2), values=values)
    assert all(torch.equal(weight, before[name]) for name, weight in model.net.named_parameters())
    assert list(deltas) == [model.weight_name(1), model.weight_name(2)]
    after = edited(model, deltas)
    for fact, z in zip(FACTS, values, strict=True):
        torch.testing.assert_close(bare_state(after, fact, 2), z, rtol=0, atol=1e-3)
    # The first of two layers carries half of the way
    first = edited(model, dict(list(deltas.items())[:1]))
    for fact in FACTS:
        m, k = model.down(1), oracle.keys(model, [""], [fact], 1).float()
        with torch.no_grad():
            moved = (first.down(1)(k) - m(k)).double() * oracle.mlp_scale(model, 1)
        torch.testing.assert_close(
            moved, (values[FACTS.index(fact)] - bare_state(model, fact, 2)) / 2, rtol=0, atol=1e-3
        )


def test_more_to_preserve_means_a_smaller_update() -> None:
    model = build("llama")
    values = [bare_state(model, fact, 2) + 1 for fact in FACTS]
    norms = [
        oracle.memit(model, [""], FACTS, replace(HYPER, covariance_weight=weight), identity(1, 2), values=values)[
            model.weight_name(1)
        ].norm()
        for weight in (0.01, 10.0, 1000.0)
    ]
    assert norms[0] > 1.1 * norms[1] > 1.1 * norms[2] > 0


@torch.no_grad()
def test_keys_of_earlier_patches_are_left_alone() -> None:
    model = build("llama")
    values = [bare_state(model, FACTS[0], 2) + 1]
    hyper = replace(HYPER, layers=(2,), covariance_weight=1.0)
    other = oracle.keys(model, [""], FACTS[1:2], 2)
    plain = oracle.memit(model, [""], FACTS[:1], hyper, identity(2), values=values)
    kept = oracle.memit(model, [""], FACTS[:1], hyper, identity(2), values=values, earlier={2: 30 * other[:, None]})
    name = model.weight_name(2)
    assert (kept[name] @ other).norm() < 0.01 * (plain[name] @ other).norm()


def test_the_whole_way_raises_the_targets_probability() -> None:
    model = build("gptj")
    hyper = replace(HYPER, steps=12)
    after = edited(model, oracle.memit(model, CONTEXTS, LOUD, hyper, identity(1, 2)))

    @torch.no_grad()
    def log_p(model: Model, fact: oracle.Prompt) -> float:
        row = oracle.rows_for(model, [""], [fact])[0]
        out = oracle.forward(model, row.ids).log_softmax(-1)
        target = row.ids[row.prompt_len :]
        return sum(float(out[row.prompt_len - 1 + i, token]) for i, token in enumerate(target)) / len(target)

    for fact in LOUD:
        assert log_p(after, fact) > log_p(model, fact) + 1


# Families with a norm after the MLP


def test_the_nearest_output_of_a_norm() -> None:
    generator = torch.Generator().manual_seed(6)
    for width, size in ((2, 1.0), (5, 0.1), (32, 1.0), (32, 20.0)):
        gain = 1 + 0.4 * torch.randn(width, generator=generator, dtype=torch.float64)
        target = size * torch.randn(width, generator=generator, dtype=torch.float64)
        u = oracle.nearest_on_norm(target, gain)
        assert float(u.square().sum()) == pytest.approx(width, rel=1e-9)
        distance = (gain * u - target).norm()
        others = torch.randn(20_000, width, generator=generator, dtype=torch.float64)
        others = torch.cat([others, u + 0.03 * others])  # far and near
        others = others * (width**0.5 / others.norm(dim=1, keepdim=True))
        assert ((gain * others - target).norm(dim=1) > distance - 1e-9).all()
    # A point on the image is its own nearest
    torch.testing.assert_close(oracle.nearest_on_norm(gain * u, gain), u)


def test_the_nearest_output_of_a_norm_by_hand() -> None:
    """γ = (1, 1), so the image is a circle of radius √2 and the nearest point lies in the target's direction."""
    u = oracle.nearest_on_norm(torch.tensor([3.0, 4.0]), torch.ones(2))
    torch.testing.assert_close(u, 2**0.5 * torch.tensor([0.6, 0.8], dtype=torch.float64))


@torch.no_grad()
@pytest.mark.parametrize("family", POST_NORM)
def test_the_gain_and_epsilon_are_the_norms(family: str) -> None:
    norm = build(family).mlp_out(2)
    gain, eps = oracle.norm_parts(norm)
    y = 1e-2 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = gain * y / (y.square().mean() + eps).sqrt()
    torch.testing.assert_close(norm(y.float()).double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", POST_NORM)
def test_behind_a_norm_the_stream_moves_to_the_nearest_point_that_can_be_reached(family: str) -> None:
    model = build(family)
    hyper = replace(HYPER, layers=(2,))
    generator = torch.Generator().manual_seed(8)
    h, m = bare_state(model, FACTS[0], 2), written(model, FACTS[0], 2)
    gain, _ = oracle.norm_parts(model.mlp_out(2))

    z = h + 2 * torch.randn(WIDTH, generator=generator)
    after = edited(model, oracle.memit(model, [""], FACTS[:1], hyper, identity(2), values=[z]))
    reached = bare_state(after, FACTS[0], 2)
    scale = oracle.mlp_scale(model, 2)
    nearest = h + scale * (gain * oracle.nearest_on_norm(m + (z - h) / scale, gain) - m)
    torch.testing.assert_close(reached, nearest, rtol=0, atol=1e-3)
    assert (nearest - z).norm() > 0.1  # out of reach on purpose
    assert (reached - z).norm() < (h - z).norm()

    u = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    z = h + scale * (gain * u * (WIDTH**0.5 / u.norm()) - m)
    after = edited(model, oracle.memit(model, [""], FACTS[:1], hyper, identity(2), values=[z]))
    torch.testing.assert_close(bare_state(after, FACTS[0], 2), z, rtol=0, atol=1e-3)
    assert (z - h).norm() > 1


@torch.no_grad()
@pytest.mark.parametrize("family", POST_NORM)
def test_behind_a_norm_what_is_written_keeps_its_scale(family: str) -> None:
    model = build(family)
    k = oracle.keys(model, CONTEXTS, FACTS[:1], 2)
    y = model.down(2)(k.float()).double()
    more = oracle.pulled_back(model, 2, k, 3 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(7)))
    assert float((y + more).norm()) == pytest.approx(float(y.norm()), rel=1e-4)
    assert more.norm() > 0.1 * y.norm()
    assert oracle.pulled_back(model, 2, k, torch.zeros(WIDTH)).norm() < 1e-4 * y.norm()


@pytest.mark.parametrize("family", POST_NORM)
def test_behind_a_norm_several_facts_and_layers_come_nearer(family: str) -> None:
    model = build(family)
    generator = torch.Generator().manual_seed(9)
    values = [bare_state(model, fact, 2) + torch.randn(WIDTH, generator=generator) for fact in FACTS]
    deltas = oracle.memit(model, [""], FACTS, HYPER, identity(1, 2), values=values)
    after = edited(model, deltas)
    for fact, z in zip(FACTS, values, strict=True):
        assert (bare_state(after, fact, 2) - z).norm() < 0.7 * (bare_state(model, fact, 2) - z).norm()
    for name, delta in deltas.items():  # the authors' code writes hundreds of times the weight here
        assert delta.norm() < 3 * model.net.get_parameter(name).norm()


@torch.no_grad()
def written(model: Model, fact: oracle.Prompt, layer: int) -> Tensor:
    """m^l [d] at the subject's last token: what the MLP adds to the residual stream."""
    found = []
    handle = model.mlp_out(layer).register_forward_hook(lambda _, args, out: found.append(out.reshape(-1, WIDTH)))
    row = oracle.rows_for(model, [""], [fact])[0]
    oracle.forward(model, row.ids)
    handle.remove()
    return found[0][row.subject_last].double()
