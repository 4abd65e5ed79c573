"""A model whose MLPs are rescaled so that it computes the same gets the same edit, in the methods that solve for one.

A gated MLP is linear in what its up-projection gives: unit i times s there, and over s in W^l, is the same function.
AlphaEdit is left out, whose threshold is an absolute size of keys.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kpatch.edit.methods import Inputs, hyper_for, method_named
from kpatch.facts.fact import Fact
from kpatch.models.model import Model
from tests.support.models import tiny

FACTS = [Fact("Mona Lisa", "The {} is in", "Rome"), Fact("Eiffel Tower", "See the {} in", "Oslo")]
QUICK = {"memit": {"lead_ins": "1", "refine": "4", "refine_from": "1"}, "rome": {"prefixes": "2"}}
METHODS = ("memit", "memit-paper", "rome", "blue")


def rescale(model: Model, factors: dict[int, Tensor]) -> None:
    """Units of W^l, l in `factors`, are read larger by factors[l] [f] and written smaller."""
    with torch.no_grad():
        for layer, factor in factors.items():
            mlp = model.mlp(layer)
            mlp.up_proj.weight.mul_(factor[:, None])  # type: ignore[union-attr, operator]
            model.down(layer).weight.div_(factor)  # type: ignore[union-attr, operator]


def written(model: Model, method: str) -> dict[int, Tensor]:
    """Δ of every layer that the method edits, [d, f]."""
    chosen = method_named(method)
    layers = [1] if method == "rome" else [1, 2]
    hyper = hyper_for(chosen, model, layers, {"steps": "4", **QUICK.get(method, {})})
    # More text than units, or a ridge is put under the covariance, which knows one size for all units
    found = chosen.edit(model, FACTS, hyper, Inputs(tokens=640))
    return {layer: found.deltas[model.weight_name(layer)].dense() for layer in found.layers}


@pytest.mark.parametrize("kind", ["whole layers", "single units"])
@pytest.mark.parametrize(("method", "family"), [*((one, "llama") for one in METHODS), ("memit", "gemma3_text")])
def test_the_edit_is_the_same_function(method: str, kind: str, family: str) -> None:
    model, other = tiny(family), tiny(family)
    width = model.key_width(1)
    # Powers of two change no digit, so that both models compute the same numbers
    power = torch.tensor([3.0, -4.0]) if kind == "whole layers" else torch.arange(width) % 5 - 2.0
    factors = {
        layer: 2.0 ** (power[place].expand(width) if kind == "whole layers" else power.roll(place))
        for place, layer in enumerate((1, 2))
    }
    rescale(other, factors)
    ids = torch.tensor([[5, 9, 11, 3, 8]])
    assert torch.equal(model.net(ids).logits, other.net(ids).logits)
    for layer, delta in written(model, method).items():
        again = written(other, method)[layer] * factors.get(layer, torch.ones(width)).double()
        assert float(delta.norm()) > 0
        assert float((again - delta).norm() / delta.norm()) < 1e-5
