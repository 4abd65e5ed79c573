"""`kpatch export` from the outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import checkpoints
from tests.support.cli import run


def test_export_to_peft(patch: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora"
    done = run("export", patch, "--to", "peft", "-o", out)
    assert done.code == 0
    assert "3 modules, rank 2, scale 1" in done.out
    assert "--max-lora-rank 8" in done.err
    assert (out / "adapter_config.json").is_file()
    assert run("export", patch, "--to", "peft", "-o", out).code == 3
    data = run("export", patch, "--to", "peft", "-o", tmp_path / "again", "--json").json
    assert {"patch", "to", "path", "bytes", "rank", "modules"} <= set(data)
    assert data["modules"][0] == {
        "name": "model.layers.0.mlp.down_proj", "rank": 2, "error": 0.0, "key_error": 0.0
    }  # fmt: skip
    cut = run("export", patch, "--to", "peft", "-o", tmp_path / "cut", "--max-rank", "1")
    assert cut.code == 0
    assert "facts may be lost" in cut.err


def test_export_to_gguf(patch: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    out = tmp_path / "x.gguf"
    assert run("export", patch, "--to", "gguf", "-o", out).code == 0
    assert out.read_bytes()[:4] == b"GGUF"
    assert run("export", patch, "--to", "gguf", "-o", out).code == 3
    assert run("export", patch, "--to", "gguf", "-o", out, "--force").code == 0


def test_export_to_a_checkpoint(patch: Path, checkpoint: Path, tmp_path: Path) -> None:
    before = checkpoints.snapshot(checkpoint)
    out = tmp_path / "patched"
    assert run("export", patch, "--to", "checkpoint", "--base", checkpoint, "-o", out).code == 0
    assert checkpoints.snapshot(checkpoint) == before
    run("apply", patch, checkpoint)
    assert (out / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_what_export_refuses(patch: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for wrong in (
        ["--to", "checkpoint"],
        ["--to", "peft", "--base", checkpoint],
        ["--to", "onnx"],
        ["--to", "checkpoint", "--base", checkpoint, "--max-rank", "2"],
        ["--to", "peft", "--max-rank", "0"],
        ["--to", "peft", "--force"],
    ):
        assert run("export", patch, *wrong, "-o", out).code == 2, wrong
    assert run("export", tmp_path / "none.patch", "--to", "peft", "-o", out).code == 2
    patch.write_bytes(patch.read_bytes()[:-4])
    assert run("export", patch, "--to", "peft", "-o", out).code == 4
    assert not out.exists()
