"""Keys and states while weights change from layer to layer: the same, whether what enters a layer is kept or not."""

from __future__ import annotations

import pytest
import torch

from kpatch.edit.layer_states import LayerStates
from kpatch.edit.requests import group_facts
from kpatch.edit.weights import restored
from kpatch.facts.fact import Fact
from tests.support.models import tiny

FACTS = [Fact(name, "In the {}", "Paris") for name in ("Mona Lisa", "Eiffel Tower", "Brazil", "Moonlight Sonata")]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_less_memory_than_the_states_take_changes_no_key(family: str) -> None:
    torch.set_num_threads(1)
    model = tiny(family)
    groups = group_facts(model, FACTS, ("", "She said."))
    large, small = LayerStates(model, groups, 10**9), LayerStates(model, groups, 1)
    assert len(large.running) == len(large.batches) < len(small.batches)
    assert (len(small.running), len(small.batches)) == (0, sum(len(group.rows) for group in groups))
    layers = [1, 2, 3]
    with restored(model, [model.weight_name(layer) for layer in layers]), torch.no_grad():
        for states in (large, small):
            states.start(layers[0])
        before = None
        for layer, above in zip(layers, [*layers[1:], layers[-1]], strict=True):
            (keys, h), (other, again) = large.at(layer, 3), small.at(layer, 3)
            for one, two in ((keys.means, other.means), (h, again)):
                torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5 * float(one.abs().max()))
            assert before is None or not torch.allclose(h, before)  # the weights have changed
            before = h
            model.weight(layer).mul_(1.5)
            for states in (large, small):
                states.advance(layer, above)


def test_rows_are_padded_to_at_most_twice_their_length() -> None:
    """A row in chat form is many times as long as the others of its fact."""
    torch.set_num_threads(1)
    model = tiny("llama")
    template = "Of all the places that there are in the world I say this. " * 8
    states = LayerStates(model, group_facts(model, FACTS, ("", "She said.", "So.", template)), 10**9)
    assert sorted(index for batch in states.batches for index in batch) == list(range(len(states.rows)))
    for batch in states.batches:
        widths = [states.rows[index].subject_last + 1 for index in batch]
        assert max(widths) <= 2 * min(widths)
    keys, _ = states.at(1, 3)
    alone = [LayerStates(model, [group], 10**9).at(1, 3)[0] for group in states.groups]
    for number, own in enumerate(alone):
        torch.testing.assert_close(
            keys.means[number], own.means[0], rtol=1e-5, atol=1e-5 * float(own.means.abs().max())
        )


def test_keys_and_states_hold_no_columns_but_the_subjects_last() -> None:
    torch.set_num_threads(1)
    model = tiny("llama")
    groups = group_facts(model, FACTS, ("", "She said."))
    states = LayerStates(model, groups, 1)
    keys, h = states.at(1, 3)
    for tensor in (keys.means, h, *(one.rows for one in keys.blocks)):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4
