"""Kinds of models that have no row: each is refused in a sentence of its own, with no hint that cannot work."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from kpatch.errors import BadInput
from kpatch.models.families import family_for, require_editable
from kpatch.models.model import wrap
from tests.support.models import tiny, tiny_net

_ATTENTION: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}
_EXPERTS: dict[str, Any] = {**_ATTENTION, "num_experts_per_tok": 2}
# Experts in every other layer, attention in every other layer
_JAMBA: dict[str, Any] = {
    **{**_EXPERTS, "num_experts": 4, "expert_layer_period": 2, "expert_layer_offset": 1},
    **{"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
}


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("mixtral", {**_EXPERTS, "num_local_experts": 4}, "its MLP is a mixture of experts"),
        ("olmoe", {**_EXPERTS, "num_experts": 4}, "its MLP is a mixture of experts"),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2}, "state-space layers, which have no MLP"),
        ("rwkv", {"hidden_size": 32, "num_hidden_layers": 2}, "is a recurrent network"),
        ("nemotron_h", {}, "attention, a state-space block or an MLP each"),
        ("falcon_h1", {}, "side by side in its layers"),
        ("flex_olmo", {**_EXPERTS, "num_experts": 4}, "is not in the table of families"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_a_kind_that_cannot_be_edited_is_refused_in_one_sentence(
    kind: str, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match=said) as caught:
        require_editable(AutoConfig.for_model(kind, **settings), "it")
    assert caught.value.hint is None
    assert caught.value.details == ("kpatch edits decoders with dense MLPs or shared experts",)


@pytest.mark.parametrize(
    ("kind", "settings", "editable"),
    [
        ("jamba", _JAMBA, (0, 2)),
        ("granitemoeshared", {**_EXPERTS, "num_local_experts": 4, "shared_intermediate_size": 16}, (0, 1, 2)),
    ],
    ids=["jamba", "granitemoeshared"],
)
def test_the_names_that_a_hint_gives_fit(kind: str, settings: dict[str, Any], editable: tuple[int, ...]) -> None:
    tokenizer = tiny("llama").tokenizer
    net = tiny_net(kind, len(tokenizer), **settings)
    with pytest.raises(BadInput, match="its MLP is a mixture of experts") as caught:
        require_editable(net.config, kind)
    names = (caught.value.hint or "").rpartition(" ")[2]
    modules = dict(pair.split("=") for pair in names.split(","))
    require_editable(net.config, kind, by_hand=True)
    assert wrap(net, tokenizer, family_for(kind, modules)).editable == editable
