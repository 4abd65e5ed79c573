"""Patches tried in memory on networks that PEFT or torch.compile have wrapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kpatch.errors import Refused
from kpatch.evaluate.patched import patched
from kpatch.evaluate.wrapped import network
from kpatch.models.model import open_model
from kpatch.patch.delta import LowRank
from tests.support.adapters import patch_for
from tests.support.checkpoints import random
from tests.support.models import tiny
from tests.support.peft_shapes import Lora, Mixed, Peft
from tests.unit.test_evaluate_patched import assert_untouched, deltas, everything


def test_a_network_that_peft_wrapped() -> None:
    model = tiny("llama")
    name, change = model.weight_name(0), deltas(model, count=1)
    before = model.weight(0).clone()
    model.layers[0].mlp.down_proj = Lora(model.down(0), LowRank(random(32, 2, seed=70), random(2, 64, seed=71)))
    wrapped = Peft(model.net)
    with patched(wrapped, change) as inside:
        assert inside is wrapped
        weight = model.layers[0].mlp.down_proj.base_layer.weight
        assert torch.equal(weight, (before.double() + change[name].dense()).float())
        with patched(model.net, deltas(model, seed=9, count=1)):  # one state, wrapped or not
            pass
    assert torch.equal(weight, before)


def test_an_active_adapter_of_the_same_patch_is_refused() -> None:
    model = tiny("llama")
    change = {model.weight_name(0): LowRank(random(32, 2, seed=1), random(2, 64, seed=2))}
    rounded = LowRank(
        *(part.bfloat16().float() for part in (change[model.weight_name(0)].left, random(2, 64, seed=2)))
    )
    layer = model.layers[0].mlp.down_proj = Lora(model.down(0), rounded)
    with pytest.raises(Refused, match="active adapter 'news'"), patched(Peft(model.net), change):
        pass
    layer.disable_adapters = True
    with patched(Peft(model.net), change):
        pass
    layer.disable_adapters = False
    with patched(Peft(model.net), {model.weight_name(0): change[model.weight_name(0)].scaled(-1.0)}):
        pass  # the opposite of the adapter is not the adapter


def test_a_patch_on_a_merged_adapter_is_refused_by_name(tmp_path: Path) -> None:
    patch = patch_for("llama", tmp_path)
    model = open_model(str(tmp_path / "model"), device="cpu")
    change = LowRank(random(32, 2, seed=70), random(2, 64, seed=71))
    layer: Any = Lora(model.down(0), change)
    model.layers[0].mlp.down_proj = layer
    layer.merge()
    for given in (patch, deltas(model, seed=9, count=1)):
        with pytest.raises(Refused, match="adapter 'news' is merged into it"), patched(Peft(model.net), given):
            pass


def test_a_network_with_mixed_adapters_is_found() -> None:
    model = tiny("llama")
    assert network(Mixed(model.net)) is model.net


def test_a_compiled_network_is_unwrapped() -> None:
    model = tiny("llama")
    before = everything(model)
    compiled = torch.compile(model.net, backend="eager")
    with patched(compiled, deltas(model)) as inside:
        assert inside is compiled
        assert not torch.equal(model.weight(0), before[model.weight_name(0)][1])
    assert_untouched(model, before)
