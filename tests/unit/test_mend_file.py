"""The file of an editor: what is written is read back, and anything else is refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kpatch.edit.make import make
from kpatch.edit.mend import Mend
from kpatch.edit.methods import hyper_for, method_named
from kpatch.edit.preset_file import PresetFile
from kpatch.errors import BadInput, Damaged, Refused
from kpatch.facts.fact import Fact
from kpatch.mend.file import read_editor, require_fit, write_editor
from kpatch.models.model import Model
from tests.support.editors import random_network
from tests.support.models import tiny
from tests.support.reports import Recorder

LAYERS = (1, 2, 3)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny("llama")


@pytest.fixture
def path(tmp_path: Path, model: Model) -> Path:
    file = tmp_path / "mend.safetensors"
    write_editor(file, model, random_network(model, LAYERS), {"steps": 3})
    return file


def about(path: Path) -> dict[str, Any]:
    size = int.from_bytes(path.read_bytes()[:8], "little")
    found: dict[str, Any] = json.loads(json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]["kpatch-editor"])
    return found


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    told = about(path)
    change(told)
    save_file(load_file(path), path, {"kpatch-editor": json.dumps(told)})
    return path


@pytest.mark.parametrize("covariance", [0, 1])
def test_what_is_written_is_read_back(path: Path, model: Model, covariance: int) -> None:
    network = random_network(model, LAYERS, covariance, covariance)
    write_editor(path, model, network, {"steps": 3}, force=True)
    found = read_editor(path)
    assert found.network.settings == network.settings
    assert found.info.places == network.places
    assert (found.info.layers, found.info.model, found.info.family) == (LAYERS, model.name, "llama")
    assert found.info.training == {"steps": 3}
    for name, tensor in network.state_dict().items():
        assert torch.equal(found.network.state_dict()[name], tensor)
    again = path.with_name("again.safetensors")
    assert write_editor(again, model, network, {"steps": 3}) == found.info.sha256
    assert again.read_bytes() == path.read_bytes()
    with pytest.raises(Refused, match="exists"):
        write_editor(path, model, network, {})


def test_a_file_cut_off_anywhere_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(Damaged, match="cannot be read"):
            read_editor(path)


def test_numbers_that_are_none_are_refused(path: Path) -> None:
    tensors, told = load_file(path), about(path)
    tensors["steps"][1] = float("nan")
    save_file(tensors, path, {"kpatch-editor": json.dumps(told)})
    with pytest.raises(Damaged, match="is damaged") as caught:
        read_editor(path)
    assert "steps" in caught.value.details[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.update(format=2),
        lambda told: told.update(method="other"),
        lambda told: told.pop("places"),
        lambda told: told.update(places=[]),
        lambda told: told["places"].append(told["places"][0]),
        lambda told: told["places"][0].update({"in": -1}),
        lambda told: told["places"][0].update({"in": 1 << 40}),
        lambda told: told["places"][0].update({"in": 1 << 20}),
        lambda told: told["settings"].update(rank=1 << 20) or told["places"][0].update({"out": 1 << 20}),
        lambda told: told["settings"].update(rank="many"),
        lambda told: told["settings"].update(rank=6),
        lambda told: told["settings"].update(regression=3),
        lambda told: told["settings"].update(covariance=2),
        lambda told: told["settings"].update(covariance=1),
        lambda told: told.update(family=7),
    ],
)
def test_descriptions_that_are_wrong_are_refused(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(BadInput, match="is no editor"):
        read_editor(rewrite(path, change))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such editor"):
        read_editor(tmp_path / "nothing.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match="is no editor"):
        read_editor(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: tiny("gpt2"), "not for tiny-gpt2"),
        (lambda: tiny("llama", intermediate_size=48), "which is not there"),
        (lambda: tiny("llama", num_hidden_layers=3), "which is not there"),
        (lambda: tiny("llama", seed=1), "the weights of training"),
    ],
)
def test_an_editor_for_another_model_is_refused(path: Path, other: Callable[[], Model], said: str) -> None:
    with pytest.raises(BadInput) as caught:
        require_fit(read_editor(path).info, other())
    assert said in " ".join([caught.value.message, *caught.value.details])
    assert "kpatch train mend" in str(caught.value.hint)


def test_a_model_that_was_edited_since_is_taken_with_a_note(path: Path) -> None:
    edited, report = tiny("llama"), Recorder()
    require_fit(read_editor(path).info, edited, report)
    assert not report.notes
    with torch.no_grad():
        edited.weight(3).mul_(1.1)
    require_fit(read_editor(path).info, edited, report)
    assert report.notes == ["model.layers.3.mlp.down_proj.weight has changed by 10% since the editor was trained"]


# The method


def test_an_editor_is_for_mend_and_mend_needs_one(path: Path, model: Model, tmp_path: Path) -> None:
    fact = [Fact("Mona Lisa", "In the {}", "Paris")]
    with pytest.raises(BadInput, match="mend needs a trained editor"):
        make(fact, out=tmp_path / "a.patch", model=model, method="mend")
    with pytest.raises(BadInput, match="memit takes no trained editor"):
        make(fact, out=tmp_path / "a.patch", model=model, editor=path)


def test_layers_and_aggregation_are_those_of_the_editor(path: Path, model: Model, tmp_path: Path) -> None:
    method = method_named("mend").with_editor(path)
    assert hyper_for(method, model, None, {}).to_dict() == {"regression": 0, "ridge": 1.0}
    assert hyper_for(method, model, None, {}).layers == LAYERS
    with pytest.raises(BadInput, match="edits layers 1, 2, 3"):
        hyper_for(method, model, [0, 1], {})
    other = tmp_path / "malmen.safetensors"
    write_editor(other, model, random_network(model, LAYERS, regression=1), {})
    assert hyper_for(Mend(read_editor(other)), model, None, {}).regression == 1
    assert hyper_for(Mend(read_editor(other)), model, None, {"regression": "0"}).regression == 0
    PresetFile("mend", layers=LAYERS).check(model, Recorder())  # the last layer is one of them
