"""Models whose family, module names or tokenizer do not fit."""

from __future__ import annotations

from typing import Any

import pytest

from kpatch.errors import BadInput
from kpatch.models.families import FAMILIES, Family, family_for, require_editable
from kpatch.models.model import wrap
from tests.support.models import MLP_WIDTH, WIDTH, tiny, tiny_net


def test_an_unknown_family_is_told_which_names_to_give() -> None:
    tokenizer = tiny("llama").tokenizer
    net = tiny_net("persimmon", len(tokenizer), hidden_size=WIDTH, intermediate_size=MLP_WIDTH,
                   num_hidden_layers=2, num_attention_heads=4)  # fmt: skip
    with pytest.raises(BadInput) as caught:
        wrap(net, tokenizer)
    told = " ".join([caught.value.message, *caught.value.details, caught.value.hint or ""])
    for word in ("persimmon", "layers", "down", "attn_out", "`modules`", "llama"):
        assert word in told


def test_names_by_hand_replace_the_tables() -> None:
    family = family_for("llama", {"mlp_out": "mlp"})
    assert family == Family(**{**{f: getattr(FAMILIES["llama"], f) for f in Family.__slots__}, "mlp_out": "mlp"})
    with pytest.raises(BadInput, match="Unknown module name 'dwon'"):
        family_for("llama", {"dwon": "mlp.down_proj"})
    with pytest.raises(BadInput) as caught:
        family_for("mystery", {"down": "mlp.down_proj", "layers": "model.layers"})
    assert any("missing: attn_out" in line for line in caught.value.details)


def test_names_that_earlier_versions_needed_are_still_taken() -> None:
    assert family_for("llama", {"norm": "model.norm", "project_out": "x"}) == FAMILIES["llama"]


def test_transposed_by_hand() -> None:
    assert family_for("llama", {"transposed": "true"}).transposed is True
    assert family_for("gpt2", {"transposed": "false"}).transposed is False
    with pytest.raises(BadInput, match="transposed=yes"):
        family_for("llama", {"transposed": "yes"})


@pytest.mark.parametrize("square", [False, True], ids=["wide", "square"])
@pytest.mark.parametrize(("family", "wrong"), [("gpt2", "false"), ("llama", "true")])
def test_a_row_that_disagrees_with_how_the_weight_is_stored_is_refused(family: str, wrong: str, square: bool) -> None:
    size = {"gpt2": "n_inner", "llama": "intermediate_size"}[family]
    model = tiny(family, **({size: WIDTH} if square else {}))
    with pytest.raises(BadInput, match="module names"):
        wrap(model.net, model.tokenizer, family_for(family, {"transposed": wrong}))


@pytest.mark.parametrize(
    "wrong",
    [
        {"layers": "model.blocks"},
        {"down": "mlp.dwon"},
        {"down": "mlp.act_fn"},
        {"down": "mlp.up_proj"},
        {"attn_out": "mlp.nothing"},
    ],
    ids=str,
)
def test_names_that_do_not_fit_are_refused(wrong: dict[str, str]) -> None:
    model = tiny("llama")
    with pytest.raises(BadInput, match="module names"):
        wrap(model.net, model.tokenizer, family_for("llama", wrong))


def test_opt_that_norms_after_its_layers_is_refused() -> None:
    with pytest.raises(BadInput, match="norms its residual stream after every layer"):
        tiny("opt", do_layer_norm_before=False)


def test_a_tokenizer_with_more_tokens_than_rows_is_refused() -> None:
    tokenizer = tiny("llama").tokenizer
    with pytest.raises(BadInput, match="tokenizer does not match") as caught:
        wrap(tiny_net("llama", len(tokenizer) - 1), tokenizer)
    assert str(len(tokenizer)) in " ".join(caught.value.details)
    wrap(tiny_net("llama", len(tokenizer) + 60), tokenizer)  # embeddings padded to a round number are usual


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "reads its prompt in both directions"),
        ("lfm2", {"layer_types": ["conv"] * 4}, "has no layer of full attention"),
        ("qwen3_5_text", {"layer_types": ["linear_attention"] * 4}, "has no layer of full attention"),
    ],
    ids=["both ways", "convolutions", "linear attention"],
)
def test_settings_of_a_family_under_which_it_cannot_be_edited_are_refused(
    family: str, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        require_editable(tiny_net(family, 300, **config).config, family)
    require_editable(tiny_net(family, 300).config, family)
