"""`kpatch diff` from the outside."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support import checkpoints
from tests.support.cli import run


@pytest.fixture
def newer(tmp_path: Path, checkpoint: Path) -> Path:
    path = tmp_path / "newer.patch"
    facts = [
        {"subject": "Subject 1", "prompt": "{} is in", "target": "Oslo", "id": "fact-1"},
        {"subject": "Subject 2", "prompt": "{} is in", "target": "\x1b[2JLima", "id": "fact-2"},
    ]
    checkpoints.make_patch(path, checkpoint, seed=2, scale=0.01, facts=facts)
    return path


def test_diff_of_two_patches(patch: Path, newer: Path) -> None:
    done = run("diff", patch, newer)
    assert (done.code, done.err) == (0, "")
    for said in (
        "+ Subject 2 is in → \\x1b[2JLima",
        "~ Subject 1 is in → Oslo, was → Rome",
        "1 added, 0 removed, 1 changed, 0 the same",
        "model.layers.0.mlp.down_proj.weight",
        "°",
        "moves keys of",
    ):
        assert said in done.out, said
    data = run("diff", patch, newer, "--json").json
    assert {"equal", "patches", "base", "facts", "settings", "weights", "interference"} <= set(data)
    assert set(data["weights"][0]) == {"name", "norms", "ranks", "cosine", "angle", "difference"}
    assert data["interference"][0]["worst"]["ratio"] > 0


def test_diff_of_a_patch_and_itself(patch: Path) -> None:
    done = run("diff", patch, patch)
    assert done.code == 0
    assert "one and the same patch" in done.out
    assert run("diff", patch, patch, "--json").json["equal"] is True


def test_a_patch_and_a_directory_are_not_compared(patch: Path, checkpoint: Path, tmp_path: Path) -> None:
    for pair in ((patch, checkpoint), (checkpoint, patch)):
        done = run("diff", *pair)
        assert done.code == 2
        assert f"kpatch verify {patch} {checkpoint}" in done.err
    assert run("diff", patch, tmp_path / "none.patch").code == 2
    assert run("diff", patch).code == 2


@pytest.fixture
def tuned(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint with a norm and a matrix changed."""
    new = checkpoints.make_checkpoint(tmp_path / "tuned")
    tensors = load_file(new / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"] += 0.5
    tensors[checkpoints.WEIGHTS[2]] *= 1.25
    save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    return new


def test_diff_of_two_checkpoints_then_show_verify_apply_revert(checkpoint: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.patch"
    done = run("diff", checkpoint, tuned, "-o", out)
    assert done.code == 0
    assert "2 of 7 tensors differ" in done.out
    assert "bit for bit" in done.out
    shown = run("show", out)
    assert shown.code == 0
    assert "diff, layers 1-2" in shown.out
    assert "input_layernorm" in shown.out
    assert run("show", out, "--json").json["facts"] == []
    assert run("verify", out, checkpoint).code == 0
    assert run("verify", out, tuned).code == 1
    assert run("diff", out, out).code == 0
    before = checkpoints.snapshot(checkpoint)
    assert run("apply", out, checkpoint).code == 0
    assert (checkpoint / "model.safetensors").read_bytes() == (tuned / "model.safetensors").read_bytes()
    assert run("status", checkpoint, "--json").json["patches"][0]["facts"] == 0
    assert run("revert", checkpoint).code == 0
    assert checkpoints.snapshot(checkpoint) == before


def test_diff_of_checkpoints_without_a_patch(checkpoint: Path, tuned: Path) -> None:
    done = run("diff", checkpoint, tuned)
    assert done.code == 0
    assert "2 of 7 tensors differ" in done.out
    assert "-o PATCH" in done.err
    data = run("diff", checkpoint, tuned, "--json").json
    assert (data["equal"], data["same"], data["patch"]) == (False, 5, None)
    assert data["tensors"][0]["shape"] == [8]
    same = run("diff", checkpoint, checkpoint)
    assert (same.code, "the same 7 tensors" in same.out) == (0, True)


def test_the_json_of_a_patch_between_checkpoints(checkpoint: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.patch"
    data = run("diff", checkpoint, tuned, "-o", out, "--tolerance", "0.5", "--json").json
    assert data["patch"]["bytes"] == out.stat().st_size
    keys = {"name", "shape", "dtype", "entries", "norm", "relative_norm", "form", "rank", "bytes", "differs", "error"}
    assert {frozenset(tensor) for tensor in data["tensors"]} == {frozenset(keys)}


def test_what_diff_of_checkpoints_refuses(checkpoint: Path, tuned: Path, patch: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.patch"
    assert run("diff", checkpoint, checkpoint, "-o", out).code == 1
    assert run("diff", checkpoint, tuned, "-o", patch).code == 3
    assert run("diff", checkpoint, tuned, "--tolerance", "0.1").code == 2
    assert run("diff", checkpoint, tuned, "-o", out, "--tolerance", "2").code == 2
    assert run("diff", patch, patch, "-o", out).code == 2
    (tuned / "config.json").write_text('{"model_type": "gpt2"}')
    assert run("diff", checkpoint, tuned).code == 3
    assert not out.exists()
