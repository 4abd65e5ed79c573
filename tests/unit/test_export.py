"""Adapters against plain readings of what PEFT and llama.cpp do with them: W + (alpha / r) B A."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from kpatch.errors import BadInput, Refused
from kpatch.evaluate.patched import patched
from kpatch.export import gguf, peft
from kpatch.export.base import BaseAddress
from kpatch.export.formats import export_patch
from kpatch.export.lora import adapter, module_name
from kpatch.models.families import FAMILIES, choices
from kpatch.patch.delta import Dense
from kpatch.patch.format import pack, read_patch, write_patch
from kpatch.patch.header import read_header
from tests.support import checkpoints
from tests.support.adapters import LAYERS, patch_for
from tests.support.checkpoints import random
from tests.support.models import tiny
from tests.support.reports import Recorder

BASE = BaseAddress("tiny/model", "main")


def as_peft_reads_it(folder: Path) -> dict[str, Tensor]:
    """The change of every module's weight by its full name, with nothing of kpatch in between."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    assert (config["peft_type"], config["bias"]) == ("LORA", "none")
    assert config["task_type"] == (None if config["auto_mapping"] else "CAUSAL_LM")
    assert not config["use_rslora"]
    assert not config["use_dora"]
    changes = {}
    for name in config["target_modules"]:
        a = tensors.pop(f"base_model.model.{name}.lora_A.weight")
        b = tensors.pop(f"base_model.model.{name}.lora_B.weight")
        assert a.shape[0] == b.shape[1] == config["r"]
        change = config["lora_alpha"] / config["r"] * (b.double() @ a.double())
        changes[name] = change.T if config["fan_in_fan_out"] else change
    assert not tensors
    return changes


# gpt2 stores W as [in, out], the others as [out, in]
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gpt_neox", "opt"])
def test_the_adapter_is_the_patch(tmp_path: Path, family: str) -> None:
    path, model = patch_for(family, tmp_path), tiny(family)
    found = adapter(read_header(path))
    written = peft.write(found, tmp_path / "lora", BASE)
    assert written == sum(file.stat().st_size for file in (tmp_path / "lora").iterdir())
    assert sorted(file.name for file in (tmp_path / "lora").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    changes = as_peft_reads_it(tmp_path / "lora")
    assert len(changes) == len(LAYERS)
    before = {name: model.net.get_submodule(name).weight.detach().double() for name in changes}
    with patched(model, path):
        for name, change in changes.items():
            after = model.net.get_submodule(name).weight.detach().double()
            torch.testing.assert_close(before[name] + change, after, rtol=1e-6, atol=2e-6)
            assert float(change.norm()) > 1


def test_the_adapted_model_answers_as_the_patched_one(tmp_path: Path) -> None:
    path, model = patch_for("llama", tmp_path), tiny("llama")
    peft.write(adapter(read_header(path)), tmp_path / "lora", BASE)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    ids = torch.tensor([[5, 9, 30, 44]])
    hooks = []
    for name in as_peft_reads_it(tmp_path / "lora"):
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")

        def add(module: Any, given: Any, out: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            return out + given[0] @ a.T @ b.T

        hooks.append(model.net.get_submodule(name).register_forward_hook(add))
    with torch.no_grad():
        adapted = model.net(ids).logits
        for hook in hooks:
            hook.remove()
        plain = model.net(ids).logits
        with patched(model, path):
            expected = model.net(ids).logits
    torch.testing.assert_close(adapted, expected, rtol=1e-3, atol=1e-3)
    assert float((plain - expected).abs().max()) > 0.1


def test_one_rank_for_all_filled_up_with_zeros(tmp_path: Path) -> None:
    found = adapter(read_header(patch_for("llama", tmp_path, ranks=(2, 5))))
    assert (found.rank, [module.rank for module in found.modules]) == (5, [2, 5])
    config = peft.config(found, BASE)
    # no rank of its own for a module: llama.cpp knows none
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (5, 5, {}, {})
    small = found.modules[0]
    assert small.a.shape[0] == small.b.shape[1] == 5
    assert not small.a[2:].any()
    assert not small.b[:, 2:].any()
    assert [(module.error, module.key_error) for module in found.modules] == [(0.0, 0.0)] * 2
    # balanced, so that 16 bits hold both sides alike
    torch.testing.assert_close(small.a.norm(dim=1), small.b.norm(dim=0))


def test_a_rank_cut_off_is_measured(tmp_path: Path) -> None:
    path = patch_for("gpt2", tmp_path, ranks=(2, 5))
    patch, found = read_patch(path), adapter(read_header(path), max_rank=3)
    assert found.rank == 3
    kept, cut = found.modules
    assert (kept.rank, kept.error, cut.rank) == (2, 0.0, 3)
    name = f"{cut.name}.weight"
    delta = patch.deltas[name].dense()
    left = delta - (cut.b.double() @ cut.a.double()).T
    assert cut.error == pytest.approx(float(left.norm() / delta.norm()), rel=1e-5)
    assert float(torch.linalg.svdvals(delta)[3:].norm() / delta.norm()) == pytest.approx(cut.error, rel=1e-9)
    keys = patch.keys[2].double().T
    assert cut.key_error == pytest.approx(float((left.T @ keys).norm() / (delta.T @ keys).norm()), rel=1e-5)
    without = adapter(read_header(patch_for("gpt2", tmp_path / "other", keys=False)), max_rank=3)
    assert without.modules[1].key_error is None


def test_dense_changes(tmp_path: Path) -> None:
    path = patch_for("llama", tmp_path)
    made = read_patch(path)
    full = {name: Dense(random(*delta.shape, seed=1)) for name, delta in made.deltas.items()}
    infos = {name: replace(info, form="dense", rank=None) for name, info in made.manifest.deltas.items()}
    write_patch(path, replace(made.manifest, deltas=infos), pack(full, None, made.keys), force=True)
    with pytest.raises(BadInput, match="rank 32"):
        adapter(read_header(path))
    found = adapter(read_header(path), max_rank=4)
    assert all(0.1 < module.error < 1 for module in found.modules)
    low = {name: Dense(delta.dense(torch.float32)) for name, delta in made.deltas.items()}
    write_patch(path, replace(made.manifest, deltas=infos), pack(low, None, made.keys), force=True)
    assert [module.rank for module in adapter(read_header(path)).modules] == [2, 5]


def test_a_dense_change_of_low_rank_in_a_weight_stored_the_other_way(tmp_path: Path) -> None:
    path = patch_for("gpt2", tmp_path)
    made = read_patch(path)
    low = {name: Dense(delta.dense(torch.float32)) for name, delta in made.deltas.items()}
    infos = {name: replace(info, form="dense", rank=None) for name, info in made.manifest.deltas.items()}
    write_patch(path, replace(made.manifest, deltas=infos), pack(low, None, made.keys), force=True)
    found = adapter(read_header(path))
    assert [(module.rank, module.key_error) for module in found.modules] == [(2, 0.0), (5, 0.0)]
    for module in found.modules:
        change = (module.b.double() @ module.a.double()).T
        torch.testing.assert_close(change, low[f"{module.name}.weight"].dense(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_manifest_says_which_way_a_weight_is_stored(tmp_path: Path, transposed: bool) -> None:
    # square, and of a family that no table has: neither shape nor family tells
    name = "decoder.block.1.project.weight"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    checkpoints.save_tensors(tmp_path / "model", {name: random(8, 8, seed=3)}, sharded=False)
    checkpoints.make_patch(
        tmp_path / "x.patch", tmp_path / "model", weights=[name], keys=False, family="unheard", transposed=transposed
    )
    found = adapter(read_header(tmp_path / "x.patch"))
    assert peft.config(found, BASE)["fan_in_fan_out"] is transposed
    change = found.modules[0].b.double() @ found.modules[0].a.double()
    delta = read_patch(tmp_path / "x.patch").deltas[name].dense()
    torch.testing.assert_close(change.T if transposed else change, delta, rtol=1e-5, atol=1e-6)


def test_every_layer_and_a_head_beside_weights_stored_the_other_way(tmp_path: Path) -> None:
    model = tiny("gpt2", tie_word_embeddings=False)
    model.net.save_pretrained(tmp_path / "model")
    names = ["lm_head.weight", *(model.weight_name(layer) for layer in range(model.n_layers))]
    path = tmp_path / "x.patch"
    checkpoints.make_patch(path, tmp_path / "model", weights=names, keys=False, family="gpt2")
    found = adapter(read_header(path))
    assert [module.name for module in found.modules] == sorted(name.removesuffix(".weight") for name in names)
    deltas = {name.removesuffix(".weight"): delta.dense() for name, delta in read_patch(path).deltas.items()}
    for module in found.modules:
        change = module.b.double() @ module.a.double()
        goal = deltas[module.name] if module.name == "lm_head" else deltas[module.name].T
        torch.testing.assert_close(change, goal, rtol=1e-5, atol=1e-5)


def test_what_no_adapter_holds_is_named(tmp_path: Path) -> None:
    model = checkpoints.make_checkpoint(tmp_path / "model")
    names = ("model.layers.0.input_layernorm.weight", "model.embed_tokens.weight", checkpoints.WEIGHTS[0])
    checkpoints.make_patch(tmp_path / "x.patch", model, weights=names, rank=1, keys=False)
    with pytest.raises(BadInput, match="more than linear layers") as caught:
        adapter(read_header(tmp_path / "x.patch"))
    assert [line.split()[0] for line in caught.value.details] == [names[1], names[0]]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"to": "checkpoint"}, "`to=checkpoint` is no adapter"),
        ({"max_rank": 0}, "`max_rank=0` is less than 1"),
        ({"to": "gguf", "base": "smollm2"}, "`base` is for PEFT"),
        ({"force": True}, "`force` replaces a file"),
    ],
)
def test_what_cannot_be_exported_is_said_before_the_work(tmp_path: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        export_patch(tmp_path / "none.patch", tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_one_call_writes_either_adapter(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    patch = patch_for("llama", tmp_path)
    found = export_patch(patch, tmp_path / "lora", base="owner/name@v1")
    assert found.base == BaseAddress("owner/name", "v1")
    assert found.bytes == sum(path.stat().st_size for path in (tmp_path / "lora").iterdir())
    assert [module.error for module in found.adapter.modules] == [0.0] * len(found.adapter.modules)
    other = export_patch(read_patch(patch), tmp_path / "a.gguf", to="gguf")
    assert (other.base, other.bytes) == (None, (tmp_path / "a.gguf").stat().st_size)


def test_a_parent_is_missed_aloud(tmp_path: Path) -> None:
    heard = Recorder()
    adapter(read_header(patch_for("llama", tmp_path, parents=["ab" * 32])), report=heard)
    assert "made on top of patch abababababab" in heard.warnings[0]


def test_checkpoint_names_without_the_prefix(tmp_path: Path) -> None:
    manifest = read_patch(patch_for("gpt2", tmp_path)).manifest
    assert module_name("h.3.mlp.c_proj.weight", manifest) == "transformer.h.3.mlp.c_proj"
    assert module_name("transformer.h.3.mlp.c_proj.weight", manifest) == "transformer.h.3.mlp.c_proj"
    other = replace(manifest, base=replace(manifest.base, family="unheard"))
    assert module_name("h.3.mlp.c_proj.weight", other) == "h.3.mlp.c_proj"


def test_the_directory_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = adapter(read_header(patch_for("llama", tmp_path)))
    (tmp_path / "there").mkdir()
    peft.write(found, tmp_path / "there", BASE)  # an empty directory will do
    with pytest.raises(Refused, match="exists"):
        peft.write(found, tmp_path / "there", BASE)
    with pytest.raises(BadInput, match="no directory"):
        peft.write(found, tmp_path / "a" / "b", BASE)

    def broken(found: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(peft, "card", broken)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(Exception, match=r"space|full"):
        peft.write(found, tmp_path / "lora", BASE)
    assert sorted(tmp_path.iterdir()) == before
    with safe_open(tmp_path / "there" / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_facts_are_no_markup_in_the_card(tmp_path: Path) -> None:
    fact = {"subject": "*x*\n# y", "prompt": "{} <b>", "target": "[z](http://w)", "id": "a"}
    text = peft.card(adapter(read_header(patch_for("llama", tmp_path, facts=[fact], keys=False))))
    assert "- \\*x\\* \\# y \\<b\\> → \\[z\\](http://w)\n" in text


# llama.cpp


@pytest.mark.parametrize(
    ("family", "architecture"),
    [("llama", "llama"), ("gpt2", "gpt2"), ("qwen2", "qwen2"), ("gemma2", "gemma2"), ("phi", "phi2"),
     ("gpt_neox", "gptneox"), ("olmo2", "olmo2"), ("gemma3_text", "gemma3")],
)  # fmt: skip
def test_the_gguf_adapter_is_the_patch(tmp_path: Path, family: str, architecture: str) -> None:
    library = pytest.importorskip("gguf")
    path = patch_for(family, tmp_path)
    written = gguf.write(adapter(read_header(path)), tmp_path / "x.gguf")
    assert written == (tmp_path / "x.gguf").stat().st_size
    reader = library.GGUFReader(tmp_path / "x.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == architecture
    assert (fields["general.type"], fields["adapter.type"], fields["adapter.lora.alpha"]) == ("adapter", "lora", 5.0)
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    patch = read_patch(path)
    assert len(tensors) == 4
    for layer, delta in zip(LAYERS, patch.deltas.values(), strict=True):
        a, b = (tensors[f"blk.{layer}.ffn_down.weight.lora_{side}"] for side in "ab")
        assert a.shape[0] == b.shape[1] == 5  # alpha over this is the scale
        expected = delta.dense().T if family == "gpt2" else delta.dense()  # llama.cpp has [out, in] for all
        torch.testing.assert_close(b.double() @ a.double(), expected, rtol=1e-5, atol=1e-5)


def test_every_architecture_of_the_table_has_a_name_for_the_edited_weight() -> None:
    library = pytest.importorskip("gguf")
    for row in FAMILIES.values():
        if row.gguf is not None:
            table = library.get_tensor_name_map(library.MODEL_ARCH[row.gguf], 4)
            names = {
                table.get_name(f"{row.layers}.2.{down}.weight", try_suffixes=(".weight",))
                for down in choices(row.down)
            }
            assert names & {"blk.2.ffn_down.weight", "blk.2.ffn_down_shexp.weight"}, row.model_type


def test_what_llama_cpp_does_not_have(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(BadInput, match="no architecture for the family gptj"):
        gguf.write(adapter(read_header(patch_for("gptj", tmp_path))), tmp_path / "x.gguf")
    path = patch_for("llama", tmp_path / "llama")
    made = read_patch(path)
    (first, delta), info = next(iter(made.deltas.items())), made.manifest
    query = "model.layers.0.self_attn.q_proj.weight"
    base = replace(info.base, weights={query: info.base.weights[first]})
    manifest = replace(info, base=base, deltas={query: info.deltas[first]})
    write_patch(path, manifest, pack({query: delta}), force=True)
    with pytest.raises(BadInput, match="output projection") as caught:
        gguf.write(adapter(read_header(path)), tmp_path / "x.gguf")
    assert "q_proj" in caught.value.details[0]
    assert not (tmp_path / "x.gguf").exists()
    (tmp_path / "x.gguf").write_text("mine")
    with pytest.raises(Refused, match="exists"):
        gguf.write(adapter(read_header(path)), tmp_path / "x.gguf")
