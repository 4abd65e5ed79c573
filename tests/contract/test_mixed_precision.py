"""Products in bfloat16: close to float32 in every family, exact where they must be, and gone afterwards."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kpatch.edit.memit import Memit
from kpatch.edit.presets import MemitHyper
from kpatch.edit.requests import group_facts
from kpatch.facts.fact import Fact
from kpatch.models import mixed_precision as module
from kpatch.models.families import FAMILIES
from kpatch.models.mixed_precision import mixed_precision, mixes
from kpatch.models.model import Model
from kpatch.models.partial_forward import align, record_suffix
from kpatch.stats.covariance import collect
from tests.support.families import REPRESENTATIVE, slow_beyond
from tests.support.models import tiny

ROWS, COLUMNS = [[5, 9, 11, 3, 8, 7, 2], [4, 6, 8, 1], [10, 11, 12, 13, 14, 15, 16, 17, 18]], [4, 1, 5]
BFLOAT16 = 2.0**-8  # what rounding to 8 significant bits changes in a number at most

# With fewer, the smallest change sends a token to another expert, and no bound holds
EVERY_EXPERT: dict[str, dict[str, Any]] = {
    name: {"num_experts_per_tok": 4} for name in ("glm4_moe", "qwen3_5_moe_text", "lfm2_moe")
}


def mixed(family: str = "llama", **overrides: Any) -> Model:
    model = tiny(family, **overrides)
    model.mixed = True
    return model


def around(layer: nn.Module) -> Any:
    """What `mixed_precision` asks of a model, with one layer and no head."""
    net = SimpleNamespace(get_output_embeddings=lambda: None)
    return SimpleNamespace(mixed=True, net=net, layers=nn.ModuleList([layer]))


def outcome(model: Model) -> tuple[Tensor, Tensor]:
    """States behind the last layer, and a gradient through the layers above the first."""
    batch = align(ROWS, COLUMNS, model.pad_id)
    calls, hidden = record_suffix(model, batch, 0)
    hidden = hidden.requires_grad_()
    out = calls.run(hidden, 1, model.n_layers)[batch.mask[:, batch.column :].bool()]
    return out.detach(), torch.autograd.grad(out.square().sum(), hidden)[0]


@pytest.mark.parametrize("family", slow_beyond(REPRESENTATIVE, tuple(FAMILIES)))
def test_states_and_gradients_are_close_and_the_network_is_as_it_was(family: str) -> None:
    model = mixed(family, **EVERY_EXPERT.get(family, {}))
    exact = outcome(model)
    with mixed_precision(model):
        found = outcome(model)
    for one, other in zip(found, exact, strict=True):
        error = float((one - other).norm() / other.norm())
        assert 1e-5 < error < 0.1  # four layers of a random network pass errors on enlarged
    for one, other in zip(outcome(model), exact, strict=True):
        assert torch.equal(one, other)


def test_a_model_that_is_not_mixed_is_left_alone() -> None:
    model = tiny("llama")
    exact = outcome(model)
    with mixed_precision(model):
        found = outcome(model)
    assert all(map(torch.equal, found, exact))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "no bias"])
def test_a_product_and_its_gradient_are_those_of_the_rounded_factors(kind: str) -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(3)
    layer: Any = Conv1D(24, 40) if kind == "conv1d" else nn.Linear(40, 24, bias=kind != "no bias")
    layer.requires_grad_(False)
    if layer.bias is not None:
        layer.bias.normal_()
    weight = (layer.weight.T if kind == "conv1d" else layer.weight).bfloat16().double()  # [out, in]
    x, g = torch.randn(5, 40, requires_grad=True), torch.randn(5, 24)
    model = around(layer)
    with mixed_precision(model):
        out = layer(x)
        (grad,) = torch.autograd.grad(out, x, g)
    wanted = x.detach().bfloat16().double() @ weight.T
    bias = 0.0 if layer.bias is None else layer.bias.double()
    assert out.dtype == grad.dtype == torch.float32
    # The sum is rounded once, to bfloat16, before the bias comes
    assert ((out.double() - wanted - bias).abs() <= BFLOAT16 * wanted.abs() + 1e-6).all()
    back = g.bfloat16().double() @ weight
    assert ((grad.double() - back).abs() <= BFLOAT16 * back.abs() + 1e-6).all()


def test_the_part_that_sees_is_left_alone() -> None:
    model = mixed("gemma3")
    with mixed_precision(model):
        changed = [name for name, one in model.net.named_modules() if "forward" in one.__dict__]
    assert "lm_head" in changed
    assert not [name for name in changed if "vision" in name]
    assert len(changed) > model.n_layers


def test_an_input_that_was_changed_in_place_is_rounded_again() -> None:
    layer = nn.Linear(8, 8, bias=False).requires_grad_(False)
    x = torch.ones(1, 8)
    with torch.no_grad(), mixed_precision(around(layer)):
        first = layer(x).clone()
        x.mul_(2)
        assert torch.equal(layer(x), 2 * first)


def test_errors_nesting_and_trained_weights() -> None:
    model = mixed()
    trained = model.down(1)
    trained.weight.requires_grad_(True)  # type: ignore[union-attr]
    x = torch.randn(3, trained.weight.shape[1])  # type: ignore[union-attr]
    before = trained(x)

    def fail() -> None:
        with mixed_precision(model), mixed_precision(model):
            assert torch.equal(trained(x), before)
            assert "forward" in model.down(2).__dict__
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not [name for name, one in model.net.named_modules() if "forward" in one.__dict__]


def test_auto_is_mixed_only_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cpu = tiny("llama"), torch.device("cpu")
    monkeypatch.setattr(module, "has_units", lambda: True)
    assert not mixes(model, "auto", cpu)  # too small to gain by it
    monkeypatch.setattr(module, "_WORTH_IT", model.width * model.mlp_width)
    assert mixes(model, "auto", cpu)
    assert not mixes(model, "float32", cpu)
    assert not mixes(model, "auto", torch.device("cuda"))
    weights = sum(one.nbytes for one in model.net.parameters())
    monkeypatch.setattr(module, "all_memory", lambda: 2 * weights)
    assert not mixes(model, "auto", cpu)
    assert mixes(model, "mixed", cpu)
    monkeypatch.setattr(module, "all_memory", lambda: 3 * weights)
    monkeypatch.setattr(module, "has_units", lambda: False)
    assert not mixes(model, "auto", cpu)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_what_is_searched_for_is_exact_where_nothing_moved_and_close_where_it_did(family: str) -> None:
    """The first step only measures, so that δ is 0: what surrounds the search is float32."""
    facts = [Fact("Mona Lisa", "The {} is in", "Rome"), Fact("Eiffel Tower", "See the {} in", "Oslo")]
    found: dict[tuple[bool, int], Tensor] = {}
    for is_mixed in (False, True):
        model = tiny(family)
        model.mixed = is_mixed
        for steps in (1, 8):
            hyper = MemitHyper(layers=(1, 2), steps=steps, stop_loss=0.0)
            goal = Memit().objective(hyper)
            found[is_mixed, steps] = goal.search(model, group_facts(model, facts, ("",)), lambda amount: None).values
    assert torch.equal(found[True, 1], found[False, 1])
    moved, other = found[False, 8] - found[False, 1], found[True, 8] - found[True, 1]
    assert 0 < float((other - moved).norm() / moved.norm()) < 0.2


def test_keys_of_the_covariance_are_close_and_have_another_name(tmp_path: Path) -> None:
    exact, near = collect(tiny("llama"), [1], tokens=512), collect(mixed(), [1], tokens=512)
    assert exact.id != near.id  # text is sampled from another distribution, however near
    corpus = tmp_path / "words.txt"
    corpus.write_text("".join(f"The {word} of {word[::-1]}.\n" for word in map(str, range(999))), encoding="utf-8")
    text = [collect(model, [1], corpus=str(corpus), tokens=512) for model in (tiny("llama"), mixed())]
    assert text[0].id != text[1].id
    one, other = (each.moments[1].mean() for each in text)
    assert 0 < float((one - other).norm() / one.norm()) < 0.02
