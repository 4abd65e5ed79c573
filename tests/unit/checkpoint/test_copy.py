"""Patched copies (`-o`): beside the checkpoint, in another dtype, from PyTorch files."""

from __future__ import annotations

import json
import os
import shutil
import stat
from io import FileIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kpatch.checkpoint import files
from kpatch.checkpoint.apply import apply
from kpatch.checkpoint.revert import revert
from kpatch.checkpoint.status import status
from kpatch.errors import BadInput, KpatchError, Refused
from kpatch.patch.format import read_patch
from tests.support.checkpoints import (
    DTYPES,
    WEIGHTS,
    contents,
    make_checkpoint,
    make_patch,
    refused,
    save_tensors,
    snapshot,
    three,
    times,
    weights,
)
from tests.support.reports import Recorder


def test_out_writes_a_copy_and_leaves_the_checkpoint_alone(model: Path, tmp_path: Path) -> None:
    a, b, _ = three(model)
    (model / "sub").mkdir()
    (model / "sub" / "note.txt").write_text("kept")
    (model / "run.sh").write_text("#!/bin/sh")
    (model / "run.sh").chmod(0o755)
    original = snapshot(model)
    before = times(model)
    report = apply([a], model, out=tmp_path / "patched")
    assert report.model == str(tmp_path / "patched")
    assert times(model) == before
    copied = snapshot(tmp_path / "patched")
    assert {name: value[0] for name, value in copied.items() if ".kpatch" not in name} == {
        name: value[0] for name, value in original.items()
    }
    apply([b], tmp_path / "patched", out=tmp_path / "twice")
    apply([a, b], model)
    assert contents(model) == contents(tmp_path / "twice")
    revert(tmp_path / "patched")
    assert snapshot(tmp_path / "patched") == original
    revert(tmp_path / "twice", all=True)
    assert snapshot(tmp_path / "twice") == original
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_out_wants_a_place_of_its_own(model: Path, tmp_path: Path) -> None:
    a, _, _ = three(model)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "empty").mkdir()
    for out, kind, words in (
        (tmp_path / "full", Refused, "exists"),
        (tmp_path / "a.patch", Refused, "exists"),
        (model / "inside", BadInput, "inside"),
        (tmp_path / "no" / "where", BadInput, "no directory"),
    ):
        refused(lambda out=out: apply([a], model, out=out), kind, words, tmp_path)  # type: ignore[misc]
    apply([a], model, out=tmp_path / "empty")
    assert status(tmp_path / "empty").state == "clean"


def test_out_follows_links_of_the_hub_cache(tmp_path: Path) -> None:
    blobs, model = tmp_path / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    make_checkpoint(blobs, sharded=True)
    model.mkdir(parents=True)
    for blob in blobs.iterdir():
        (model / blob.name).symlink_to(blob)
    make_patch(tmp_path / "a.patch", model)
    before = snapshot(tmp_path)
    error = refused(lambda: apply([tmp_path / "a.patch"], model), Refused, "symbolic link", model)
    assert "-o" in (error.hint or "")
    apply([tmp_path / "a.patch"], model, out=tmp_path / "patched")
    assert {name: value for name, value in snapshot(tmp_path).items() if not name.startswith("patched")} == before
    assert not any(path.is_symlink() for path in (tmp_path / "patched").rglob("*"))
    revert(tmp_path / "patched")
    assert contents(tmp_path / "patched") == contents(blobs)


# Into another dtype, and from PyTorch files


def save_pickled(model: Path, target: Path, sharded: bool) -> None:
    """The same checkpoint as PyTorch .bin files."""
    target.mkdir()
    (target / "config.json").write_text((model / "config.json").read_text())
    (target / "tokenizer.json").write_text("{}")
    parts = [load_file(path) for path in sorted(model.glob("*.safetensors"))]
    if not sharded:
        torch.save({name: tensor for part in parts for name, tensor in part.items()}, target / "pytorch_model.bin")
        return
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        file = f"pytorch_model-{number:05d}-of-{len(parts):05d}.bin"
        torch.save(part, target / file)
        weight_map.update(dict.fromkeys(part, file))
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_copy_in_another_dtype_is_the_rounded_sum_in_that_dtype(
    tmp_path: Path, stored: str, dtype: str, sharded: bool
) -> None:
    model = make_checkpoint(tmp_path / "model", stored, sharded)
    (model / "config.json").write_text(
        '{"model_type": "llama", "torch_dtype": "auto", "text_config": {"dtype": "x"}, "rope_theta": 1e-05}'
    )
    (model / "config.json").chmod(0o640)
    a, b, _ = three(model)
    apply([b], model)
    before, old = snapshot(model), weights(model)
    apply([a], model, out=tmp_path / "copy", dtype=dtype)
    assert snapshot(model) == before
    target = getattr(torch, dtype)
    base = {name: tensor.to(target) for name, tensor in weights(revert_copy(model, tmp_path / "plain")).items()}
    changes = {name: torch.zeros(base[name].shape, dtype=torch.float64) for name in WEIGHTS}
    for path in sorted((a, b), key=lambda path: read_patch(path).id):
        for name, delta in read_patch(path).deltas.items():
            changes[name] += delta.dense()
    expected = {n: (t.double() + changes[n]).to(target) if n in changes else t for n, t in base.items()}
    found = weights(tmp_path / "copy")
    assert found.keys() == old.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert (config["torch_dtype"], config["text_config"]["dtype"], config["rope_theta"]) == (dtype, dtype, 1e-05)
    assert stat.S_IMODE((tmp_path / "copy" / "config.json").stat().st_mode) == 0o640
    assert (tmp_path / "copy" / "model.safetensors.index.json").exists() == sharded
    assert status(tmp_path / "copy").state == "clean"
    assert [patch["name"] for patch in status(tmp_path / "copy").patches] == ["b", "a"]
    revert(tmp_path / "copy", all=True)
    plain = weights(tmp_path / "copy")
    assert all(torch.equal(plain[name], tensor) for name, tensor in base.items())
    assert not (tmp_path / "copy" / ".kpatch").exists()


def revert_copy(model: Path, target: Path) -> Path:
    shutil.copytree(model, target)
    revert(target, all=True)
    return target


def test_a_copy_in_the_same_dtype_is_what_apply_makes_of_it(model: Path, tmp_path: Path) -> None:
    a, _, _ = three(model)
    apply([a], model, out=tmp_path / "copy", dtype="float32")
    apply([a], model)
    assert all(torch.equal(tensor, weights(model)[name]) for name, tensor in weights(tmp_path / "copy").items())
    kept = [sorted(os.listdir(folder / ".kpatch" / "base")) for folder in (model, tmp_path / "copy")]
    assert kept[0] == kept[1]


def test_a_value_that_the_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    tensors = weights(model)
    tensors["model.embed_tokens.weight"][0, 0] = 1e6
    save_tensors(model, tensors, sharded=False)
    make_patch(tmp_path / "a.patch", model)
    error = refused(
        lambda: apply([tmp_path / "a.patch"], model, out=tmp_path / "copy", dtype="float16"),
        Refused,
        "embed_tokens.* cannot hold",
        tmp_path,
    )
    assert "bfloat16" in (error.hint or "")


def test_only_a_copy_has_a_dtype_of_its_own(model: Path, tmp_path: Path) -> None:
    a, _, _ = three(model)
    refused(lambda: apply([a], model, dtype="float32"), BadInput, "keeps its dtype", tmp_path)
    refused(lambda: apply([a], model, out=tmp_path / "x", dtype="int8"), BadInput, "no dtype int8", tmp_path)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_pytorch_checkpoint_is_copied_as_safetensors(tmp_path: Path, sharded: bool, dtype: str | None) -> None:
    model = make_checkpoint(tmp_path / "model", sharded=True)
    a, _, _ = three(model)
    pickled = tmp_path / "pickled"
    save_pickled(model, pickled, sharded)
    before = snapshot(pickled)
    error = refused(lambda: apply([a], pickled), Refused, "cannot be changed in place", pickled)
    assert "-o NEW_DIR" in (error.hint or "")
    plan = apply([a], pickled, out=tmp_path / "copy", check=True).plan
    assert [weight.name for weight in plan.weights] == list(WEIGHTS)
    assert not (tmp_path / "copy").exists()
    apply([a], pickled, out=tmp_path / "copy", dtype=dtype)
    assert snapshot(pickled) == before
    names = sorted(path.name for path in (tmp_path / "copy").iterdir() if path.name.startswith(("model", "pytorch")))
    files = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert names == ([*files, "model.safetensors.index.json"] if sharded else ["model.safetensors"])
    apply([a], model, out=tmp_path / "expected", dtype=dtype)
    expected, found = weights(tmp_path / "expected"), weights(tmp_path / "copy")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    revert(tmp_path / "copy")
    plain = weights(model)
    assert all(torch.equal(t, plain[n].to(t.dtype)) for n, t in weights(tmp_path / "copy").items())


def test_shared_and_transposed_tensors_of_a_pytorch_file_are_written_out(model: Path, tmp_path: Path) -> None:
    a, _, _ = three(model)
    tensors = weights(model)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # tied: one storage, two names
    tensors[WEIGHTS[0]] = tensors[WEIGHTS[0]].T.contiguous().T  # the same numbers, stored by columns
    tensors["position_ids"] = torch.arange(7)[None]
    (tmp_path / "pickled").mkdir()
    torch.save(tensors, tmp_path / "pickled" / "pytorch_model.bin")
    apply([a], tmp_path / "pickled", out=tmp_path / "copy", dtype="bfloat16")
    found = weights(tmp_path / "copy")
    assert torch.equal(found["lm_head.weight"], tensors["model.embed_tokens.weight"].bfloat16())
    assert torch.equal(found["position_ids"], tensors["position_ids"])
    apply([a], model, out=tmp_path / "expected", dtype="bfloat16")
    assert torch.equal(found[WEIGHTS[0]], weights(tmp_path / "expected")[WEIGHTS[0]])


def test_a_pytorch_file_of_the_old_format_is_read_too(model: Path, tmp_path: Path) -> None:
    a, _, _ = three(model)
    (tmp_path / "pickled").mkdir()
    file = tmp_path / "pickled" / "pytorch_model.bin"
    torch.save(weights(model), file, _use_new_zipfile_serialization=False)
    apply([a], tmp_path / "pickled", out=tmp_path / "copy")
    apply([a], model)
    assert all(torch.equal(t, weights(model)[n]) for n, t in weights(tmp_path / "copy").items())


def test_weight_files_that_stay_behind_are_warned_of(model: Path, tmp_path: Path) -> None:
    a = tmp_path / "a.patch"
    make_patch(a, model, scale=0.01)  # too small to be warned of
    for name in ("pytorch_model.bin", "consolidated.safetensors", "tf_model.h5"):
        (model / name).write_bytes(b"x")
    recorder = Recorder()
    apply([a], model, report=recorder)
    assert [line.split()[0] for line in recorder.warnings] == [
        "consolidated.safetensors",
        "pytorch_model.bin",
        "tf_model.h5",
    ]


def test_a_full_disk_is_foreseen_for_a_copy_too(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, _, _ = three(model)
    usage = type("Usage", (), {"free": 4000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    refused(lambda: apply([a], model, out=tmp_path / "x"), KpatchError, "Not enough", tmp_path)
    refused(lambda: apply([a], model, out=tmp_path / "x", dtype="bfloat16"), KpatchError, "Not enough", tmp_path)


def test_where_copies_share_blocks_less_space_is_wanted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _, _ = three(model)
    plan = apply([a], model, check=True).plan
    usage = type("Usage", (), {"free": (plan.bytes_written + plan.bytes_needed) // 2})
    assert plan.bytes_written * 21 // 20 < usage.free < plan.bytes_needed  # type: ignore[attr-defined]
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    refused(lambda: apply([a], model), KpatchError, "Not enough", tmp_path)

    def clone(source: FileIO, target: FileIO) -> bool:
        files.write_at(target, 0, files.read_at(source, 0, os.fstat(source.fileno()).st_size))
        return True

    monkeypatch.setattr(files, "clone", clone)
    before = snapshot(model)
    apply([a], model)
    assert not list(tmp_path.rglob("probe*"))
    revert(model)
    assert snapshot(model) == before
