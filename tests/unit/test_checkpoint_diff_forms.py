"""Two checkpoints of one model that are saved in different forms, with other prefixes before their layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kpatch.checkpoint.apply import apply
from kpatch.checkpoint.diff.checkpoints import diff_checkpoints
from kpatch.checkpoint.revert import revert
from kpatch.errors import Refused
from tests.support.checkpoints import make_checkpoint, snapshot
from tests.support.vision_forms import three_forms

CHANGED = "layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = three_forms("gemma3", tmp_path_factory.mktemp("gemma3"))
    file = found["new"] / "model.safetensors"
    tensors = load_file(file)
    (name,) = (name for name in tensors if name.endswith(CHANGED))
    tensors[name] = tensors[name] + torch.outer(torch.ones(len(tensors[name])), tensors[name][0])
    save_file(tensors, file, metadata={"format": "pt"})
    return found


def test_tensors_are_found_under_other_prefixes_and_go_by_the_first_ones_names(
    forms: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "x.patch"
    found = diff_checkpoints(forms["old"], forms["new"], out)
    assert [tensor.name.rsplit("layers", 1)[1] for tensor in found.tensors] == [CHANGED.removeprefix("layers")]
    assert any("otherwise" in note and "go by the names in" in note for note in found.notes)
    before = snapshot(forms["old"])
    apply([out], forms["old"])
    name = found.tensors[0].name
    after = load_file(forms["old"] / "model.safetensors")[name]
    wanted = [tensor for other, tensor in load_file(forms["new"] / "model.safetensors").items() if CHANGED in other]
    assert torch.equal(after, wanted[0])
    revert(forms["old"])
    assert snapshot(forms["old"]) == before


def test_a_wrapper_holds_more_than_its_text_model(forms: dict[str, Path]) -> None:
    with pytest.raises(Refused, match="do not hold the same tensors") as caught:
        diff_checkpoints(forms["text"], forms["new"])
    assert all(line.startswith(f"only in {forms['new']}: model.") or "more" in line for line in caught.value.details)
    assert not any("layers.1.mlp" in line and "language_model" in line for line in caught.value.details)


def test_two_tensors_of_one_never_become_one_of_the_other(tmp_path: Path) -> None:
    one, other = make_checkpoint(tmp_path / "one"), make_checkpoint(tmp_path / "other")
    tensors = load_file(one / "model.safetensors")
    norm = "model.layers.0.input_layernorm.weight"
    save_file({**tensors, norm.removeprefix("model."): tensors[norm].clone()}, one / "model.safetensors")
    with pytest.raises(Refused, match="do not hold the same tensors") as caught:
        diff_checkpoints(one, other)
    assert caught.value.details == (f"only in {one}: {norm.removeprefix('model.')}",)
