"""PEFT loads the exported folder alone and computes what the patched model computes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kpatch.evaluate.patched import patched
from kpatch.models.model import Model, open_model
from kpatch.patch.format import pack, read_patch, write_patch
from tests.support import news
from tests.support.adapters import patch_for, patch_of
from tests.support.cli import run
from tests.support.models import tiny
from tests.support.vision_forms import save, three_forms

Client = Callable[[dict[str, Any]], dict[str, Any]]
# GPT-2 stores W as [in, out]; in Gemma 2 and OLMo 2 a norm stands behind it
FAMILIES = ("llama", "gpt2", "gptj", "gpt_neox", "opt", "phi", "qwen2", "gemma2", "olmo2")
IDS = [5, 9, 30, 44, 7]


def agrees(found: dict[str, Any], model: Model, patch: Path) -> None:
    """What PEFT computed without the adapter, with it and with it merged is what the model does without and with the
    patch; and PEFT had nothing to set right, as no layer without a change has an adapter.
    """
    ids = torch.tensor([IDS])
    with torch.no_grad():
        plain = model.net(ids).logits[0]
        with patched(model, patch):
            expected = model.net(ids).logits[0]
    assert float((expected - plain).abs().max()) > 0.1, patch
    for way, goal in (("base", plain), ("auto", expected), ("merged", expected)):
        error = float((torch.tensor(found[way]) - goal).abs().max())
        assert error < 1e-3, (patch, way, error)
    assert found["warnings"] == [], patch


def test_peft_computes_what_the_patched_model_computes(tmp_path: Path, client: Client) -> None:
    adapters = {}
    for family in FAMILIES:
        folder = tmp_path / family
        path = patch_for(family, folder, scale=0.1)
        done = run("export", path, "--to", "peft", "--base", folder / "model", "-o", folder / "lora")
        assert done.code == 0, done.err
        adapters[family] = str(folder / "lora")
    found = client({"adapters": adapters, "ids": IDS, "prompts": []})["adapters"]
    for family in FAMILIES:
        agrees(found[family], tiny(family), tmp_path / family / "x.patch")


def test_peft_finds_the_modules_of_another_form_of_the_model(tmp_path: Path, client: Client) -> None:
    bases, patches = {}, {}
    for wrapper in ("gemma3", "mistral3"):
        forms = three_forms(wrapper, tmp_path / wrapper)
        for made, base in (("text", "old"), ("text", "new"), ("new", "text")):
            name = f"{wrapper}-{made}-{base}"
            bases[name] = forms[base]
            model = open_model(str(forms[made]), device="cpu")
            patches[name] = patch_of(model, forms[made], tmp_path / name, scale=0.1)
    for wrapper in ("qwen2_5_vl", "qwen3_5", "llama4"):  # no class for text loads them whole
        model = tiny(wrapper)
        bases[wrapper] = save(model, tmp_path / wrapper)
        patches[wrapper] = patch_of(model, bases[wrapper], tmp_path / f"{wrapper}.patch", keys=False, scale=0.1)
    for name, base in bases.items():
        done = run("export", patches[name], "--to", "peft", "--base", base, "-o", tmp_path / f"{name}-lora")
        assert done.code == 0, done.err
    adapters = {name: str(tmp_path / f"{name}-lora") for name in bases}
    found = client({"adapters": adapters, "ids": IDS, "prompts": []})["adapters"]
    for name, base in bases.items():
        agrees(found[name], open_model(str(base), device="cpu"), patches[name])


def test_what_peft_does_while_a_patch_is_on_ends_as_without_it(tmp_path: Path, client: Client) -> None:
    patch = patch_for("llama", tmp_path, scale=0.1)
    checkout = Path(__file__).parents[3]
    found = client({"inside": {"kpatch": str(checkout), "model": str(tmp_path / "model"), "patch": str(patch)}})
    wrong = [name for name, right in found["inside"].items() if not right]
    assert not wrong
    assert len(found["inside"]) == 10


def test_peft_finds_the_base_by_the_hub_id_and_commit_of_the_patch(tmp_path: Path, client: Client) -> None:
    path, commit = patch_for("llama", tmp_path, scale=0.1), "ab" * 20
    made = read_patch(path)
    known = replace(made.manifest.base, name="owner/model", revision=commit)
    write_patch(path, replace(made.manifest, base=known), pack(made.deltas), force=True)
    assert run("export", path, "--to", "peft", "-o", tmp_path / "lora").code == 0
    # the hub's cache as a download of that commit leaves it; there is no main to fall back to
    snapshot = Path(os.environ["HF_HOME"]) / "hub" / "models--owner--model" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    (tmp_path / "model").rename(snapshot)
    found = client({"adapters": {"hub": str(tmp_path / "lora")}, "ids": IDS, "prompts": []})["adapters"]["hub"]
    model = tiny("llama")
    with torch.no_grad(), patched(model, path):
        expected = model.net(torch.tensor([IDS])).logits[0]
    assert float((torch.tensor(found["auto"]) - expected).abs().max()) < 1e-3


@news.needs_smollm2
def test_peft_answers_with_the_facts_of_the_patch(tmp_path: Path, smollm2: Path, client: Client) -> None:
    done = run("export", news.PATCH, "--to", "peft", "--base", "smollm2", "-o", tmp_path / "lora")
    assert done.code == 0, done.err
    found = client({"adapters": {"news": str(tmp_path / "lora")}, "ids": IDS, "prompts": news.prompts()})
    answers = found["adapters"]["news"]["answers"]
    assert news.known(answers) == 12, answers
