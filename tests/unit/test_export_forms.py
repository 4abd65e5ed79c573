"""Adapters for another form of the model that a patch was made for: alone, or with vision under other names."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import kpatch
from kpatch.errors import Refused
from kpatch.models.model import open_model
from tests.support.adapters import patch_of
from tests.support.cli import run
from tests.support.models import tiny
from tests.support.reports import Recorder
from tests.support.vision_forms import save, three_forms
from tests.unit.test_export import as_peft_reads_it

IDS = torch.tensor([[5, 9, 30, 44, 7]])
FORMS = ["text", "old", "new"]


def loaded_as_peft_does(folder: Path) -> Any:
    """The base that adapter_config.json names, of the class that PEFT takes for it."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    own = config["auto_mapping"]
    kind: Any = getattr(import_module(own["parent_library"]), own["base_model_class"]) if own else AutoModelForCausalLM
    return kind.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32).eval()


@torch.no_grad()
def assert_the_adapter_is_the_patch(patch: Path, base: Path, lora: Path) -> list[str]:
    """Compares what the adapted base says with the patched model; gives the names of the adapter's modules."""
    kpatch.export_patch(patch, out=lora, to="peft", base=base)
    net, changes = loaded_as_peft_does(lora), as_peft_reads_it(lora)
    plain = net(IDS).logits
    for name, change in changes.items():
        net.get_submodule(name).weight += change.float()
    model = open_model(str(base), device="cpu")
    with kpatch.patched(model, patch):
        expected = model.net(IDS).logits
    torch.testing.assert_close(net(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert float((plain - expected).abs().max()) > 0.1
    return list(changes)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return three_forms("gemma3", tmp_path_factory.mktemp("gemma3"))


@pytest.mark.parametrize("made", FORMS)
@pytest.mark.parametrize("base", FORMS)
def test_modules_are_called_as_in_the_base_that_is_given(
    forms: dict[str, Path], tmp_path: Path, made: str, base: str
) -> None:
    patch = patch_of(open_model(str(forms[made]), device="cpu"), forms[made], tmp_path / "x.patch", scale=0.1)
    names = assert_the_adapter_is_the_patch(patch, forms[base], tmp_path / "lora")
    prefix = "model" if base == "text" else "model.language_model"
    assert names == [f"{prefix}.layers.{layer}.mlp.down_proj" for layer in (0, 2)]


@pytest.mark.parametrize("wrapper", ["mistral3", "qwen3_5", "llama4"])
def test_a_base_that_no_class_for_text_loads_whole_names_its_own(wrapper: str, tmp_path: Path) -> None:
    model = tiny(wrapper)
    directory = save(model, tmp_path / "model")
    patch = patch_of(model, directory, tmp_path / "x.patch", keys=False, scale=0.1, parents=["ab" * 32])
    assert_the_adapter_is_the_patch(patch, directory, tmp_path / "lora")
    done = run("export", patch, "--to", "peft", "--base", directory, "-o", tmp_path / "again")
    assert "AutoPeftModel.from_pretrained" in done.err


def test_a_base_whose_network_lacks_the_weights_is_refused(forms: dict[str, Path], tmp_path: Path) -> None:
    model = open_model(str(forms["text"]), device="cpu")
    patch = patch_of(model, forms["text"], tmp_path / "x.patch")
    save(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    fewer = {**config, "num_hidden_layers": 2, "layer_types": config["layer_types"][:2]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(fewer), encoding="utf-8")
    with pytest.raises(Refused, match="has no module for what x changes") as caught:
        kpatch.export_patch(patch, out=tmp_path / "lora", to="peft", base=tmp_path / "model")
    assert caught.value.details == ("model.layers.2.mlp.down_proj.weight",)
    assert not (tmp_path / "lora").exists()


def test_a_base_that_transformers_does_not_build_keeps_the_names_of_the_patch(
    forms: dict[str, Path], tmp_path: Path
) -> None:
    model = open_model(str(forms["text"]), device="cpu")
    patch = patch_of(model, forms["text"], tmp_path / "x.patch")
    save(model, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "unheard"}', encoding="utf-8")
    heard = Recorder()
    kpatch.export_patch(patch, out=tmp_path / "lora", to="peft", base=tmp_path / "model", report=heard)
    assert "modules are named as in x" in heard.warnings[0]
    assert list(as_peft_reads_it(tmp_path / "lora")) == [
        "model.layers.0.mlp.down_proj",
        "model.layers.2.mlp.down_proj",
    ]


def test_a_hub_id_is_not_looked_up_and_that_is_said(forms: dict[str, Path], tmp_path: Path) -> None:
    text = patch_of(open_model(str(forms["text"]), device="cpu"), forms["text"], tmp_path / "text.patch")
    done = run("export", text, "--to", "peft", "--base", "owner/model", "-o", tmp_path / "lora")
    assert "owner/model was not looked up" in done.err
    whole = patch_of(open_model(str(forms["new"]), device="cpu"), forms["new"], tmp_path / "new.patch")
    done = run("export", whole, "--to", "peft", "--base", "owner/model", "-o", tmp_path / "other")
    assert "AutoModelForImageTextToText" in done.err
    assert "AutoPeft" not in done.err
