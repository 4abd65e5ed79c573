"""What PEFT does to a weight while a patch is on it: merging, unloading, and copies that run in its place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kpatch.errors import Refused
from kpatch.evaluate.patched import patched
from kpatch.models.model import Model
from kpatch.patch.delta import LowRank
from tests.support.checkpoints import random
from tests.support.models import tiny
from tests.support.peft_shapes import Copied, Lora, Peft
from tests.unit.test_evaluate_patched import assert_untouched, deltas, everything

CHANGE = LowRank(random(32, 2, seed=70), random(2, 64, seed=71))


def adapted_model() -> tuple[Model, Lora]:
    model = tiny("llama")
    model.layers[0].mlp.down_proj = layer = Lora(model.down(0), CHANGE)
    return model, layer


def merged_without_a_patch() -> Tensor:
    _, layer = adapted_model()
    layer.merge()
    return layer.weight.detach()


def changes() -> dict[str, LowRank]:
    return deltas(tiny("llama"), count=1)


def test_an_adapter_merged_inside_is_merged_as_without_the_patch() -> None:
    model, layer = adapted_model()
    with patched(Peft(model.net), changes()):
        layer.merge()
        assert not torch.equal(layer.weight, merged_without_a_patch())
    assert layer.merged_adapters == ["news"]
    assert torch.equal(layer.weight, merged_without_a_patch())


def test_an_adapter_merged_inside_two_patches_comes_out_of_neither() -> None:
    model, layer = adapted_model()
    with patched(Peft(model.net), changes()):
        with patched(Peft(model.net), deltas(tiny("llama"), seed=9, count=1)):
            layer.merge()
        one_left = layer.weight.detach().clone()
    assert not torch.equal(one_left, merged_without_a_patch())
    assert torch.equal(layer.weight, merged_without_a_patch())


def test_an_adapter_merged_and_taken_out_inside_leaves_the_weight_bit_for_bit() -> None:
    model, layer = adapted_model()
    before = layer.weight.detach().clone()
    with patched(Peft(model.net), changes()):
        layer.merge()
        layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_an_adapter_merged_and_unloaded_inside_is_merged_as_without_the_patch() -> None:
    model, layer = adapted_model()
    with patched(Peft(model.net), changes()):
        layer.merge()
        model.layers[0].mlp.down_proj = layer.base_layer
    assert torch.equal(model.weight(0), merged_without_a_patch())


def test_a_layer_put_around_and_merged_inside_is_merged_as_without_the_patch() -> None:
    model = tiny("llama")
    with patched(model, changes()):
        model.layers[0].mlp.down_proj = layer = Lora(model.down(0), CHANGE)
        layer.merge()
    assert torch.equal(layer.weight, merged_without_a_patch())


def test_an_error_inside_leaves_the_merge_as_without_the_patch() -> None:
    model, layer = adapted_model()

    def merge_and_fail() -> None:
        layer.merge()
        raise KeyError

    with pytest.raises(KeyError), patched(Peft(model.net), changes()):
        merge_and_fail()
    assert torch.equal(layer.weight, merged_without_a_patch())


@pytest.mark.parametrize("around", ["down_proj", "mlp"])
def test_a_weight_of_which_an_adapter_runs_a_copy_is_refused(around: str) -> None:
    model = tiny("llama")
    before, original = everything(model), model.down(0)
    inside = model.layers[0] if around == "mlp" else model.layers[0].mlp
    copied = Copied(getattr(inside, around))
    setattr(inside, around, copied)
    with pytest.raises(Refused, match=r"adapter 'news' runs a copy of its own of model\.layers\.0\.mlp\.down_proj"):
        with patched(Peft(model.net), changes()):
            pass
    copied.disable_adapters = True
    with patched(Peft(model.net), changes()):
        assert not torch.equal(original.weight, before[model.weight_name(0)][1])
        copied.disable_adapters = False  # the original one comes back whatever runs now
    assert torch.equal(original.weight, before[model.weight_name(0)][1])
    setattr(inside, around, copied.original_module)
    assert_untouched(model, before)
