"""Loading a checkpoint directory: what is reported, what is left as it was, what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from kpatch.errors import BadInput
from kpatch.models.model import open_model, wrap
from kpatch.reporter import Advance
from tests.support.models import tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny Llama directory; tests copy it before they change it."""
    model = tiny("llama")
    folder = tmp_path_factory.mktemp("whole") / "llama"
    model.net.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


class Heard:
    """A reporter that keeps what it was given."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def task(self, description: str, total: int | None = None, unit: str = "") -> Iterator[Advance]:
        self.lines.append(description)
        yield lambda amount: None

    def note(self, message: str) -> None:
        self.lines.append(message)

    def warn(self, message: str) -> None:
        self.lines.append(f"warning: {message}")


def test_an_address_is_reported_and_opened(llama: Path) -> None:
    heard = Heard()
    model = open_model(str(llama), device="cpu", report=heard)
    assert (model.name, model.path, model.n_layers) == ("llama", llama, 4)
    assert heard.lines == [f"{llama}: checkpoint directory {llama}", "Loading llama"]


def test_transformers_logs_as_before_after_a_load(llama: Path) -> None:
    from transformers.utils import logging

    level = logging.get_verbosity()
    try:
        logging.set_verbosity_info()
        open_model(str(llama), device="cpu")
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(level)


# Weights that are not there, or not numbers


Weights = dict[str, Tensor]


def changed(llama: Path, folder: Path, change: Callable[[Weights], Weights], **config: Any) -> Path:
    """A copy of the directory with other weights and settings."""
    copy = Path(shutil.copytree(llama, folder / "changed"))
    file = copy / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**settings, **config}))
    return copy


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


HOLES: dict[str, tuple[Callable[[Weights], Weights], dict[str, Any], str, str]] = {
    "attention": (without("layers.3.self_attn"), {}, "4 weights", "model.layers.3.self_attn.k_proj.weight"),
    "head": (without("lm_head"), {}, "1 weight of changed is", "lm_head.weight"),
    "layers": (lambda w: w, {"num_hidden_layers": 5}, "9 weights", "model.layers.4."),
    "prefix": (lambda w: {f"net.{k}": v for k, v in w.items()}, {}, "39 weights", "found net."),
}


@pytest.mark.parametrize("hole", HOLES)
def test_weights_that_are_not_in_the_checkpoint_are_never_made_up(llama: Path, tmp_path: Path, hole: str) -> None:
    change, config, number, named = HOLES[hole]
    with pytest.raises(BadInput, match="not in its checkpoint") as caught:
        open_model(str(changed(llama, tmp_path, change, **config)), device="cpu")
    assert caught.value.message.startswith(number)
    assert any(named in line for line in caught.value.details)


def test_layers_that_the_config_leaves_out_are_never_dropped(llama: Path, tmp_path: Path) -> None:
    copy = changed(llama, tmp_path, lambda weights: weights, num_hidden_layers=2)
    with pytest.raises(BadInput, match=r"holds more layers than config\.json says") as caught:
        open_model(str(copy), device="cpu")
    assert caught.value.details[0] == "no place for model.layers.2.input_layernorm.weight"


def test_layers_that_guess_tokens_ahead_are_left_out(llama: Path, tmp_path: Path) -> None:
    def ahead(weights: Weights) -> Weights:
        name = "model.layers.3.mlp.down_proj.weight"
        return {**weights, name.replace("3", "4"): weights[name].clone()}

    copy = changed(llama, tmp_path, ahead, num_nextn_predict_layers=1)
    assert open_model(str(copy), device="cpu").n_layers == 4


def test_a_config_without_layers_is_named(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="changed has no layers") as caught:
        open_model(str(changed(llama, tmp_path, lambda weights: weights, num_hidden_layers=0)), device="cpu")
    assert caught.value.hint == "give the config.json that belongs to the weights"


def test_a_tied_head_is_no_hole(tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    model.net.save_pretrained(tmp_path / "tied")
    model.tokenizer.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    assert torch.equal(open_model(str(tmp_path / "tied"), device="cpu").net.lm_head.weight, model.net.lm_head.weight)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def in_shards(directory: Path, folder: Path, extra: dict[str, str], twice: str | None = None) -> Path:
    """A copy of a directory in two shards; `extra` goes into the index, and `twice` is in the first shard as zeros."""
    copy = Path(shutil.copytree(directory, folder / "shards"))
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {FIRST: names[: len(names) // 2], SECOND: names[len(names) // 2 :]}
    for file, own in shards.items():
        held = {name: weights[name] for name in own}
        if file == FIRST and twice is not None:
            held[twice] = torch.zeros_like(weights[twice])
        save_file(held, copy / file, metadata={"format": "pt"})
    listed = {name: file for file, own in shards.items() for name in own}
    index = {"metadata": {"total_size": 1}, "weight_map": {**listed, **extra}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    return copy


def test_a_tied_head_that_the_index_lists_and_no_shard_holds_is_no_hole(tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    model.net.save_pretrained(tmp_path / "tied")
    model.tokenizer.save_pretrained(tmp_path / "tied")
    copy = in_shards(tmp_path / "tied", tmp_path, {"lm_head.weight": SECOND})
    assert torch.equal(open_model(str(copy), device="cpu").net.lm_head.weight, model.net.lm_head.weight)


def test_a_tensor_in_two_shards_of_which_the_index_names_the_last_is_loaded(llama: Path, tmp_path: Path) -> None:
    name = "model.norm.weight"
    want = load_file(llama / "model.safetensors")[name]
    copy = in_shards(llama, tmp_path, {}, twice=name)
    assert name in load_file(copy / FIRST)
    assert name in load_file(copy / SECOND)
    assert torch.equal(open_model(str(copy), device="cpu").net.get_parameter(name), want)


@pytest.mark.parametrize("size", [0, 3000])
def test_a_weight_file_that_is_cut_off_is_named(llama: Path, tmp_path: Path, size: int) -> None:
    copy = in_shards(llama, tmp_path, {})
    os.truncate(copy / SECOND, size)
    with pytest.raises(BadInput, match="A weight file of shards is cut off or damaged") as caught:
        open_model(str(copy), device="cpu")
    assert caught.value.details[0].startswith(f"{SECOND}: ")


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "adapter_model.safetensors"])
def test_a_weight_file_of_another_name_is_told(llama: Path, tmp_path: Path, name: str) -> None:
    copy = changed(llama, tmp_path, lambda weights: weights)
    (copy / "model.safetensors").rename(copy / name)
    with pytest.raises(BadInput, match="is a model directory without weights") as caught:
        open_model(str(copy), device="cpu")
    assert f"found {name}" in caught.value.details


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("config.json", '{"model_type": "llama", "hidden_size": 32, "num_attention_heads": 5}', "config.json"),
        ("config.json", '{"model_type": "llama", "dtype": "float99"}', "config.json"),
        ("config.json", "{", "config.json"),
        ("tokenizer.json", "{", "the tokenizer's files"),
        ("tokenizer.json", "{}", "the tokenizer's files"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(llama: Path, tmp_path: Path, file: str, text: str, said: str) -> None:
    copy = changed(llama, tmp_path, lambda weights: weights)
    (copy / file).write_text(text)
    with pytest.raises(BadInput, match=f"could not be loaded: {said} cannot be read"):
        open_model(str(copy), device="cpu")


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.float8_e5m2, "F8_E5M2")],
    ids=str,
)
@pytest.mark.parametrize("where", ["single", "shards", "scales"])
def test_codes_never_load_as_ordinary_numbers(
    llama: Path, tmp_path: Path, dtype: torch.dtype, stored: str, where: str
) -> None:
    """transformers does it without a word, with scales beside them or without."""

    def code(weights: Weights) -> Weights:
        coded = {**weights, DOWN: (weights[DOWN] * 50).to(dtype)}
        return {**coded, DOWN.replace("weight", "SCB"): torch.ones(4)} if where == "scales" else coded

    copy = changed(llama, tmp_path, code)
    if where == "shards":
        copy = in_shards(copy, tmp_path, {})
    with pytest.raises(BadInput, match="holds quantized weights, which cannot be edited") as caught:
        open_model(str(copy), device="cpu")
    said = "bitsandbytes 8-bit: tensor" if where == "scales" else f"tensor {DOWN} is stored as {stored}"
    assert said in caught.value.message


def test_codes_in_memory_are_refused_too() -> None:
    model = tiny("llama")
    model.down(0).weight = torch.nn.Parameter(model.weight(0).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(BadInput, match="holds quantized weights") as caught:
        wrap(model.net, model.tokenizer)
    assert "float8_e4m3fn" in caught.value.details[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_named(llama: Path, tmp_path: Path, value: float) -> None:
    def spoil(weights: Weights) -> Weights:
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        return weights

    with pytest.raises(BadInput, match="NaN or infinity") as caught:
        open_model(str(changed(llama, tmp_path, spoil)), device="cpu")
    assert caught.value.details == ("model.layers.1.mlp.up_proj.weight",)


def test_weights_of_another_shape_are_named(llama: Path, tmp_path: Path) -> None:
    def cut(weights: Weights) -> Weights:
        name = "model.layers.2.mlp.up_proj.weight"
        return {**weights, name: weights[name][:-1].contiguous()}

    with pytest.raises(BadInput, match="1 weight of changed does not have the shape") as caught:
        open_model(str(changed(llama, tmp_path, cut)), device="cpu")
    assert caught.value.details == ("model.layers.2.mlp.up_proj.weight: expected [64, 32], found [63, 32]",)


def test_an_adapter_beside_whole_weights_is_noted(llama: Path, tmp_path: Path) -> None:
    copy = changed(llama, tmp_path, lambda weights: weights)
    (copy / "adapter_config.json").write_text("{}")
    heard = Heard()
    open_model(str(copy), device="cpu", report=heard)
    assert any("an adapter beside its weights" in line for line in heard.lines)


def test_an_adapter_beside_whole_weights_is_not_loaded_where_peft_is_installed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks these two whether PEFT is there, and loads what lies beside the weights if so."""
    copy = changed(llama, tmp_path, lambda weights: weights)
    (copy / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "none/such"})
    )
    loaded: list[object] = []
    for module in ("models.auto.auto_factory", "integrations.peft"):
        monkeypatch.setattr(f"transformers.{module}.is_peft_available", lambda: True)
    adapters: dict[str, tuple[set[str], ...]] = {}
    monkeypatch.setattr(PreTrainedModel, "load_adapter", lambda net, *args, **kwargs: loaded.append(args) or adapters)
    want = open_model(str(llama), device="cpu").net.state_dict()
    got = open_model(str(copy), device="cpu").net.state_dict()
    assert not loaded
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


# Models of other kinds


KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "t5": ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
    "bert": ({"model_type": "bert"}, "is an encoder"),
    "mamba": ({"model_type": "mamba"}, "state-space"),
    "mixtral": ({"model_type": "mixtral"}, "its MLP is a mixture of experts"),
    "olmoe": ({"model_type": "olmoe"}, "its MLP is a mixture of experts"),
    "gemma3n": ({"model_type": "gemma3n"}, "several residual streams"),
    "gemma3n-text": ({"model_type": "gemma3n_text"}, "several residual streams"),
    "quantized": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized weights.*gptq"),
    "quantized-text": ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "quantized weights.*awq"),
    "remote": ({"model_type": "mystery", "auto_map": {"AutoConfig": "code.Config"}}, "code of its own"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_another_kind_is_refused_in_a_sentence_that_says_why(
    llama: Path, tmp_path: Path, kind: str
) -> None:
    config, why = KINDS[kind]
    with pytest.raises(BadInput, match=why) as caught:
        open_model(str(changed(llama, tmp_path, lambda weights: weights, **config)), device="cpu")
    assert "`modules`" not in (caught.value.hint or "")


def test_a_diffusion_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(BadInput, match="diffusion model"):
        open_model(str(tmp_path), device="cpu")


# What transformers makes of odd files, with another message or without one


def test_biases_that_the_config_leaves_out_are_never_dropped(llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.bias"
    copy = changed(llama, tmp_path, lambda weights: {**weights, name: torch.ones(32)})
    with pytest.raises(BadInput, match=r"holds biases where config\.json says that there are none") as caught:
        open_model(str(copy), device="cpu")
    assert caught.value.details == (f"no place for {name}",)


def test_complex_weights_never_lose_their_imaginary_part(llama: Path, tmp_path: Path) -> None:
    copy = changed(llama, tmp_path, lambda weights: {**weights, DOWN: weights[DOWN].to(torch.complex64)})
    with pytest.raises(BadInput, match="holds complex numbers") as caught:
        open_model(str(copy), device="cpu")
    assert caught.value.details == (f"{DOWN} is stored as C64",)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"head_dim": 0}, "ZeroDivisionError"),
        ({"num_key_value_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "magic"}, "'magic' is not known to transformers"),
        ({"rope_parameters": {"rope_type": "magic", "rope_theta": 1e4}}, "'magic' is not known to transformers"),
        ({"model_type": "LLAMA"}, "LLAMA"),
        ({"model_type": 3}, "model type `3`"),
    ],
    ids=str,
)
def test_a_config_that_no_network_can_be_built_of_is_bad_input(
    llama: Path, tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput, match="could not be loaded") as caught:
        open_model(str(changed(llama, tmp_path, lambda weights: weights, **config)), device="cpu")
    assert said in caught.value.details[0]
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "expected a weight_map"),
        ('{"metadata": {}, "weight_map": {}}', "expected a weight_map"),
        ('{"metadata": {}, "weight_map": {"a": 3}}', "expected a weight_map"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', 'expected an object "metadata"'),
        ('{"metadata": {}, "weight_map": {"a": "/tmp/model.safetensors"}}', "beside it, found '/tmp/model.safe"),
        ('{"metadata": {}, "weight_map": {"a": "../model.safetensors"}}', "beside it, found '../model.safe"),
        ('{"metadata": {}, "weight_map": {"a": "folder.safetensors"}}', "beside it, found 'folder.safe"),
    ],
)
def test_an_index_that_cannot_be_followed_is_named(llama: Path, tmp_path: Path, text: str, said: str) -> None:
    copy = in_shards(llama, tmp_path, {})
    (copy / "folder.safetensors").mkdir()
    (copy / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BadInput, match="The index of the weight files cannot be read") as caught:
        open_model(str(copy), device="cpu")
    assert said in caught.value.details[0]
