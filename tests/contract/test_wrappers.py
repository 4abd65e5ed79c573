"""Models with vision: their text part is edited, and a patch fits it alone and in the forms in which it is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import kpatch
from benchmarks.families import FACT, SETTINGS, asked, digest
from kpatch.edit.resolve import solve_again
from kpatch.errors import BadInput
from kpatch.facts.fact import Fact
from kpatch.models.model import open_model
from kpatch.models.text_part import find_layers, loader, text_config
from kpatch.patch.compare import diff_patches
from tests.support.models import WRAPPERS, tiny
from tests.support.vision_forms import NEW, three_forms

pytestmark = pytest.mark.usefixtures("one_thread", "shared_statistics")

OTHER = Fact("Eiffel Tower", "By the {}", "Rome", id="eiffel")


@pytest.fixture(scope="module", params=["gemma3", pytest.param("mistral3", marks=pytest.mark.slow)])
def forms(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One text model three times: alone, and in a wrapper under the earlier names and under the later ones."""
    return three_forms(request.param, tmp_path_factory.mktemp(request.param))


PREFIX = {"text": "model.", "old": "language_model.model.", "new": NEW}


@pytest.fixture(scope="module")
def patches(forms: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("patches")
    for form in ("text", "new"):
        kpatch.make([FACT], out=folder / form, model=str(forms[form]), layers=[1, 2], tokens=400, settings=SETTINGS)
    return {form: folder / form for form in ("text", "new")}


def test_the_three_forms_are_one_model(forms: dict[str, Path]) -> None:
    for form, directory in forms.items():
        assert f"{PREFIX[form]}layers.1.mlp.down_proj.weight" in load_file(directory / "model.safetensors")
    chances = [asked(directory)[0] for directory in forms.values()]
    assert chances == pytest.approx([chances[0]] * 3)


@pytest.mark.parametrize(("made", "found"), [("text", "old"), ("text", "new"), ("new", "text"), ("new", "old")])
def test_a_patch_of_one_form_fits_another(
    forms: dict[str, Path], patches: dict[str, Path], made: str, found: str
) -> None:
    directory, patch = forms[found], patches[made]
    base, (before, off) = digest(directory), asked(directory)
    assert kpatch.apply([patch], directory, check=True).checked_only
    assert digest(directory) == base
    report = kpatch.apply([patch], directory)
    assert sorted(weight.name for weight in report.weights) == [
        f"{PREFIX[found]}layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)
    ]
    after, off_after = asked(directory)
    assert after > 1.3 * before
    assert max(off, off_after) < 1e-5
    kpatch.revert(directory)
    assert digest(directory) == base
    assert asked(directory)[0] == pytest.approx(before)


@pytest.mark.parametrize(("made", "found"), [("text", "old"), ("new", "text")])
def test_a_patch_of_one_form_fits_another_in_memory(
    forms: dict[str, Path], patches: dict[str, Path], made: str, found: str
) -> None:
    model = open_model(str(forms[found]), device="cpu")
    before = model.weight(1).clone()
    with kpatch.patched(model, patches[made]):
        inside = model.weight(1).clone()
    with kpatch.patched(model, patches["new" if made == "text" else "text"]):
        assert torch.allclose(inside, model.weight(1), atol=1e-6)
    assert not torch.equal(inside, before)
    assert torch.equal(model.weight(1), before)


def test_a_patch_on_top_of_one_of_another_form(
    forms: dict[str, Path], patches: dict[str, Path], tmp_path: Path
) -> None:
    try:
        kpatch.apply([patches["text"]], forms["old"])
        later = tmp_path / "later"
        settings = {"layers": [1, 2], "tokens": 400, "settings": SETTINGS}
        kpatch.make([OTHER], out=later, on=str(forms["old"]), **settings)
        kpatch.apply([later], forms["old"])
        assert kpatch.status(forms["old"]).state == "clean"
    finally:
        kpatch.revert(forms["old"], all=True)


def test_patches_of_two_forms_stack_and_compare_by_one_name(
    forms: dict[str, Path], patches: dict[str, Path], tmp_path: Path
) -> None:
    second = tmp_path / "second"
    kpatch.make([OTHER], out=second, model=str(forms["new"]), layers=[1, 2], tokens=400, settings=SETTINGS)
    kpatch.stack([patches["text"], second], out=tmp_path / "both")
    both = kpatch.read_patch(tmp_path / "both")
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)]
    assert sorted(both.deltas) == names
    parts = [
        kpatch.read_patch(patches["text"]).deltas[names[0]],
        kpatch.read_patch(second).deltas[f"{NEW}{names[0][6:]}"],
    ]
    assert both.deltas[names[0]].rank == sum(part.rank or 0 for part in parts)
    kpatch.apply([tmp_path / "both"], forms["old"], check=True)
    found = diff_patches(patches["text"], second)
    assert found.base is None
    assert [weight.name for weight in found.weights] == names


def test_the_patches_say_the_same_of_the_text_part(patches: dict[str, Path]) -> None:
    read = {form: kpatch.read_patch(patch) for form, patch in patches.items()}
    families = {patch.manifest.base.family for patch in read.values()}
    assert len(families) == 1
    assert families <= {"gemma3_text", "mistral"}
    hashes = [sorted(weight.sha256 for weight in patch.manifest.base.weights.values()) for patch in read.values()]
    assert hashes[0] == hashes[1]


def test_vision_is_loaded_with_the_text_and_left_alone(forms: dict[str, Path]) -> None:
    model = open_model(str(forms["new"]), device="cpu")
    stored = load_file(forms["new"] / "model.safetensors")
    vision = {name for name in stored if "vision" in name}
    loaded = dict(model.net.named_parameters(remove_duplicate=False))
    assert vision
    assert all(torch.equal(loaded[name], stored[name]) for name in vision)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_configuration_of_the_text_part_counts(wrapper: str) -> None:
    model = tiny(wrapper)
    assert model.config is text_config(model.net.config)
    assert model.config is not model.net.config
    assert model.family.model_type == WRAPPERS[wrapper][0] == model.config.model_type
    assert model.width == model.config.hidden_size
    assert model.n_layers == model.config.num_hidden_layers
    assert type(model.net).__name__.endswith("ForConditionalGeneration")
    assert "vision" not in model.family.layers


def test_layers_that_are_nowhere_are_named_under_all_prefixes() -> None:
    with pytest.raises(
        AttributeError, match=r"model\.blocks or model\.language_model\.blocks or language_model\.model"
    ):
        find_layers(tiny("gemma3").net, "model.blocks")


def test_a_text_model_is_loaded_as_before() -> None:
    assert loader(tiny("llama").net.config) is AutoModelForCausalLM


def test_a_wrapper_that_reads_its_prompt_in_both_directions_is_refused(forms: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "paligemma", "text_config": {"model_type": "gemma"}}')
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((forms["text"] / name).read_bytes())
    with pytest.raises(BadInput, match="in both directions"):
        open_model(str(tmp_path), device="cpu")


def test_patches_of_two_forms_are_solved_again_together(
    forms: dict[str, Path], patches: dict[str, Path], tmp_path: Path
) -> None:
    given: dict[str, Any] = {"layers": [1, 2], "tokens": 400, "settings": SETTINGS}
    kpatch.make([OTHER], out=tmp_path / "other.patch", model=str(forms["text"]), **given)
    both = [patches["new"], tmp_path / "other.patch"]
    for form in ("text", "old"):
        out = tmp_path / f"{form}.patch"
        solve_again(both, out, model=str(forms[form]))
        base, (before, _) = digest(forms[form]), asked(forms[form])
        kpatch.apply([out], forms[form])
        assert asked(forms[form])[0] > 1.3 * before
        kpatch.revert(forms[form])
        assert digest(forms[form]) == base
    found = diff_patches(tmp_path / "text.patch", tmp_path / "old.patch")
    assert found.facts.same == 2
    assert all(weight.difference is not None and weight.difference < 1e-4 for weight in found.weights)
