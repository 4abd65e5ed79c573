"""PyTorch .bin files that are wrong or want to run code: never loaded, refused in words, nothing written."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kpatch.checkpoint.apply import apply
from kpatch.errors import BadInput, Damaged, KpatchError, Refused
from tests.support import cli
from tests.support.checkpoints import WEIGHTS, make_checkpoint, make_patch, snapshot

BIN = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """A checkpoint with one .bin file that fits the patch beside it."""
    model = make_checkpoint(tmp_path / "source")
    make_patch(tmp_path / "a.patch", model)
    (tmp_path / "model").mkdir()
    torch.save(load_file(model / "model.safetensors"), tmp_path / "model" / BIN)
    return tmp_path / "model"


def refused(pickled: Path, *kinds: type[KpatchError]) -> KpatchError:
    around = pickled.parent
    before = snapshot(around)
    for check in (True, False):
        with pytest.raises(kinds) as caught:
            apply([around / "a.patch"], pickled, out=around / "copy", check=check)
    assert snapshot(around) == before
    text = "\n".join((caught.value.message, *caught.value.details, caught.value.hint or ""))
    assert not any(ord(c) < 32 and c != "\n" for c in text)
    assert len(text) < 1500
    return caught.value


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_not_loaded(pickled: Path, tmp_path: Path, zipped: bool) -> None:
    tensors = {**torch.load(pickled / BIN, weights_only=True), "x": Evil(tmp_path / "owned")}
    torch.save(tensors, pickled / BIN, _use_new_zipfile_serialization=zipped)
    error = refused(pickled, BadInput)
    assert "could run code, so it was not loaded" in error.message
    assert not (tmp_path / "owned").exists()
    ran = cli.run("apply", tmp_path / "a.patch", pickled, "-o", tmp_path / "copy")
    assert ran.code == 2
    assert "Traceback" not in ran.err


def test_a_bare_pickle_that_runs_code_is_not_loaded(pickled: Path, tmp_path: Path) -> None:
    (pickled / BIN).write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
    refused(pickled, BadInput, Damaged)
    assert not (tmp_path / "owned").exists()


def test_files_that_are_no_pytorch_files_are_damage(pickled: Path) -> None:
    raw = (pickled / BIN).read_bytes()
    for data in (b"", b"x", b"PK\x03\x04", raw[: len(raw) // 2], raw[:-30], bytes(500), b"version https://git-lfs"):
        (pickled / BIN).write_bytes(data)
        refused(pickled, Damaged, BadInput)
    (pickled / BIN).unlink()
    os.mkfifo(pickled / BIN)
    refused(pickled, BadInput)
    (pickled / BIN).unlink()
    (pickled / BIN).symlink_to("nowhere")
    refused(pickled, BadInput)


CONTENTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda t: list(t.values()), "no table of tensors"),
    "nested": (lambda t: {"state_dict": t}, "more than tensors"),
    "numbers": (lambda t: {**t, "step": 3}, "more than tensors"),
    "a key that is no text": (lambda t: {**t, 3: t[WEIGHTS[0]]}, "more than tensors"),
    "sparse": (lambda t: {**t, "x": torch.eye(3).to_sparse()}, "cannot hold"),
    "complex": (lambda t: {**t, "x": torch.zeros(2, dtype=torch.complex128)}, "cannot hold"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_no_table_of_tensors_is_named(pickled: Path, name: str) -> None:
    change, words = CONTENTS[name]
    torch.save(change(torch.load(pickled / BIN, weights_only=True)), pickled / BIN)
    assert words in refused(pickled, BadInput).message


def test_an_ordered_table_gives_the_copy_of_a_plain_one(pickled: Path, tmp_path: Path) -> None:
    tensors = torch.load(pickled / BIN, weights_only=True)
    apply([tmp_path / "a.patch"], pickled, out=tmp_path / "plain")
    torch.save(OrderedDict(tensors), pickled / BIN)
    apply([tmp_path / "a.patch"], pickled, out=tmp_path / "copy")
    copy = tmp_path / "copy" / "model.safetensors"
    assert copy.read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()
    written = load_file(copy)
    assert written.keys() == tensors.keys()
    assert {name for name in tensors if not torch.equal(written[name], tensors[name])} == set(WEIGHTS)


def test_quantized_and_other_weights_are_refused(pickled: Path) -> None:
    tensors = torch.load(pickled / BIN, weights_only=True)
    torch.save({**tensors, "model.layers.0.mlp.up_proj.qweight": torch.zeros(2, dtype=torch.int32)}, pickled / BIN)
    assert "GPTQ" in refused(pickled, Refused).message
    tensors[WEIGHTS[0]][0, 0] += 1
    torch.save(tensors, pickled / BIN)
    assert "does not fit" in refused(pickled, Refused).message


@pytest.mark.parametrize("name", ["../other.bin", "/etc/x.bin", "sub/x.bin", "model.safetensors", "..", "missing.bin"])
def test_an_index_cannot_lead_out_of_its_directory(pickled: Path, name: str) -> None:
    (pickled.parent / "other.bin").write_bytes((pickled / BIN).read_bytes())
    tensors = torch.load(pickled / BIN, weights_only=True)
    (pickled / INDEX).write_text(json.dumps({"weight_map": {**dict.fromkeys(tensors, BIN), WEIGHTS[0]: name}}))
    refused(pickled, BadInput if name == "missing.bin" else Refused)


def test_an_index_that_does_not_match_its_files_is_refused(pickled: Path) -> None:
    tensors = torch.load(pickled / BIN, weights_only=True)
    (pickled / INDEX).write_text(json.dumps({"weight_map": {**dict.fromkeys(tensors, BIN), "ghost": BIN}}))
    assert "does not match" in refused(pickled, Damaged).message
    (pickled / "second.bin").write_bytes((pickled / BIN).read_bytes())
    (pickled / INDEX).write_text(json.dumps({"weight_map": {**dict.fromkeys(tensors, BIN), "ghost": "second.bin"}}))
    assert "does not match" in refused(pickled, Damaged).message


def test_a_tensor_in_two_files_counts_where_the_index_and_transformers_agree(pickled: Path, tmp_path: Path) -> None:
    """As with safetensors: files are read in the order of their names, so the last wins whatever the index says."""
    tensors = torch.load(pickled / BIN, weights_only=True)
    last = "second.bin"
    torch.save({WEIGHTS[0]: tensors[WEIGHTS[0]]}, pickled / last)
    torch.save({**tensors, WEIGHTS[0]: torch.zeros_like(tensors[WEIGHTS[0]])}, pickled / BIN)

    def name(listed: dict[str, str]) -> None:
        (pickled / INDEX).write_text(json.dumps({"weight_map": {**dict.fromkeys(tensors, BIN), **listed}}))

    name({WEIGHTS[0]: last})
    apply([tmp_path / "a.patch"], pickled, out=tmp_path / "patched")
    apply([tmp_path / "a.patch"], tmp_path / "source")
    expected = load_file(tmp_path / "source" / "model.safetensors")
    found = {name: tensor for file in (tmp_path / "patched").glob("*.safetensors")
             for name, tensor in load_file(file).items()}  # fmt: skip
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    name({"other": last})
    torch.save({WEIGHTS[0]: tensors[WEIGHTS[0]], "other": torch.zeros(2)}, pickled / last)
    error = refused(pickled, Refused)
    assert "does not fit" in error.message
    assert "stands in two files" in error.details[0]
    table = {"weight_map": {"other": last, **{name: BIN for name in tensors if name != WEIGHTS[0]}}}
    (pickled / INDEX).write_text(json.dumps(table))
    assert "stands in two files" in refused(pickled, Damaged).message


def test_names_cannot_lead_anywhere(pickled: Path, tmp_path: Path) -> None:
    """A tensor's name is only a key in the copy's header, whatever it looks like."""
    tensors = torch.load(pickled / BIN, weights_only=True)
    torch.save({**tensors, "../../x": torch.zeros(2)}, pickled / BIN)
    apply([tmp_path / "a.patch"], pickled, out=tmp_path / "copy")
    assert "../../x" in load_file(tmp_path / "copy" / "model.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.patch", "copy", "model", "source"]
