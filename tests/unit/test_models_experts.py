"""Mixtures of experts: where a fact can be written in them, and how a layer is refused where it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kpatch.edit.make import make
from kpatch.edit.memit import Memit
from kpatch.edit.memit_paper import MemitPaper
from kpatch.edit.methods import check_layers, hyper_for
from kpatch.edit.norms import before_norm
from kpatch.edit.rome import Rome
from kpatch.errors import BadInput
from kpatch.facts.fact import Fact
from kpatch.models.families import family_for, require_editable
from kpatch.models.model import open_model, wrap
from kpatch.models.module_names import ranges
from kpatch.stats.covariance import collect
from tests.support.models import EXPERT_WIDTH, MLP_WIDTH, tiny, tiny_net
from tests.support.reports import Recorder

pytestmark = pytest.mark.usefixtures("shared_statistics")

# Gemma 4 with experts: a norm behind each part, and one behind their sum
SHARED_NORM = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}


def test_a_layer_without_a_dense_mlp_or_a_shared_expert_is_refused_by_name() -> None:
    model = tiny("qwen3_moe", num_hidden_layers=6, mlp_only_layers=[0, 1, 2, 4])
    with pytest.raises(BadInput, match=r"^Layers 3 and 5 are mixtures of experts without a shared expert$") as caught:
        check_layers(model, [1, 3, 5])
    assert caught.value.details == ("tiny-qwen3_moe can be edited in layers 0-2, 4",)
    with pytest.raises(BadInput, match=r"^Layer 3 is a mixture of experts"):
        collect(model, [2, 3], tokens=100)
    with pytest.raises(BadInput, match=r"^Layer 3 is a mixture of experts"):
        hyper_for(Memit(), model, [1, 2], {"first_layer": "3"})
    check_layers(model, [0, 2, 4])


def test_a_model_of_experts_alone_is_refused_in_a_sentence() -> None:
    with pytest.raises(BadInput, match="its MLP is a mixture of experts") as caught:
        tiny("qwen3_moe", mlp_only_layers=[])
    assert "attribute" not in str(caught.value)
    assert not caught.value.hint


def test_a_directory_of_experts_alone_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    tokenizer = tiny("llama").tokenizer
    tiny_net("qwen3_moe", len(tokenizer), mlp_only_layers=[]).config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="its MLP is a mixture of experts"):
        open_model(str(tmp_path), device="cpu")


def test_layers_are_chosen_among_those_that_can_be_edited() -> None:
    dense = tiny("qwen3_moe", num_hidden_layers=12, mlp_only_layers=[0, 2, 3, 8])
    heard = Recorder()
    hyper = hyper_for(Memit(), dense, None, {}, heard)
    assert hyper.layers == (2, 3)
    assert any("layers 2-3 of 12" in line for line in heard.notes)
    far = tiny("qwen3_moe", num_hidden_layers=12, mlp_only_layers=[8, 11])
    hyper = hyper_for(Memit(), far, None, {})
    assert (hyper.layers, hyper.first_layer) == ((8,), 8)
    shared = tiny("deepseek_v3", num_hidden_layers=12)
    assert hyper_for(Memit(), shared, None, {}).layers == (1, 2, 3, 4, 5, 6)


def test_a_model_that_could_be_edited_in_its_last_layer_alone_needs_other_layers() -> None:
    model = tiny("qwen3_moe", mlp_only_layers=[3])
    with pytest.raises(BadInput):
        hyper_for(Memit(), model, None, {})
    with pytest.raises(BadInput, match="is the last of"):
        check_layers(model, [3])


def test_covariance_has_the_width_of_each_layer() -> None:
    model = tiny("deepseek_v3")
    found = collect(model, [0, 1], tokens=300, use_cache=False)
    assert {layer: moment.width for layer, moment in found.moments.items()} == {0: MLP_WIDTH, 1: EXPERT_WIDTH}


def test_rome_says_why_it_does_not_write_behind_a_gate() -> None:
    model = tiny("qwen2_moe")
    for method in (Rome(), MemitPaper()):
        with pytest.raises(BadInput, match="multiplies its shared expert's output by a gate") as caught:
            hyper_for(method, model, [1], {})
        assert "memit" in (caught.value.hint or "")
        assert hyper_for(method, model, [0], {}).layers == (0,)
    with pytest.raises(BadInput, match="by a gate"):
        model.residual_scale(1)
    assert model.residual_scale(0) == 1.0


def test_methods_that_undo_a_norm_do_not_write_where_experts_share_it() -> None:
    model = tiny("gemma4_text", **SHARED_NORM)
    for method in (Rome(), MemitPaper()):
        with pytest.raises(BadInput, match="norms its MLP's output together with that of its experts") as caught:
            hyper_for(method, model, [1], {})
        assert caught.value.hint == "`method` memit finds its writes with the norm in place"
        assert hyper_for(method, tiny("gemma4_text"), [1], {}).layers == (1,)
    written = torch.ones(1, model.width)
    with pytest.raises(BadInput, match="norms its MLP's output together"):
        before_norm(model, 1, written, written)
    assert hyper_for(Memit(), model, [1], {}).layers == (1,)


def test_memit_finds_its_writes_behind_a_norm_that_experts_share(tmp_path: Path) -> None:
    made = tiny("gemma4_text", **SHARED_NORM, final_logit_softcapping=None)
    made.net.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    numbers = {"steps": "20", "learning_rate": "0.1", "leverage": "5000"}
    facts, model = [Fact("Mona Lisa", "In the {}", "Paris")], str(tmp_path / "model")
    out = tmp_path / "x.patch"
    found = make(facts, out=out, model=model, layers=[1, 2], tokens=400, settings=numbers, device="cpu").facts[0]
    assert found["after"]["probability"] > 1.5 * found["before"]["probability"]


def test_names_by_hand_serve_for_an_unknown_family_of_experts() -> None:
    tokenizer = tiny("llama").tokenizer
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
                "num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
                "moe_intermediate_size": 20, "n_shared_experts": 2, "n_group": 1, "topk_group": 1}  # fmt: skip
    net = tiny_net("solar_open", len(tokenizer), **settings)
    with pytest.raises(BadInput, match="its MLP is a mixture of experts") as caught:
        require_editable(net.config, "solar")
    assert "down=mlp.shared_experts.down_proj" in (caught.value.hint or "")
    modules = {"layers": "model.layers", "down": "mlp.shared_experts.down_proj", "attn_out": "self_attn.o_proj"}
    model = wrap(net, tokenizer, family_for("solar_open", {**modules, "mlp_out": "mlp"}))
    assert (model.editable, model.mlp_width, model.residual_scale(2)) == ((0, 1, 2), 40, 1.0)


def test_ranges_for_people() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([4]) == "4"
