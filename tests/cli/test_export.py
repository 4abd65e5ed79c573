"""`kpatch export` from the outside."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kpatch.patch.format import pack, read_patch, write_patch
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
    assert data["base"] == {"address": "tiny/model", "revision": "main"}
    assert data["modules"][0] == {
        "name": "model.layers.0.mlp.down_proj", "rank": 2, "error": 0.0, "key_error": 0.0
    }  # fmt: skip
    cut = run("export", patch, "--to", "peft", "-o", tmp_path / "cut", "--max-rank", "1")
    assert cut.code == 0
    assert "facts may be lost" in cut.err


def test_the_base_of_an_adapter(patch: Path, checkpoint: Path, tmp_path: Path) -> None:
    done = run("export", patch, "--to", "peft", "--base", checkpoint, "-o", tmp_path / "lora")
    assert done.code == 0
    assert "AutoPeftModelForCausalLM" in done.err
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["base_model_name_or_path"], config["revision"]) == (str(checkpoint), None)
    other = checkpoints.make_checkpoint(tmp_path / "other", seed=9)
    assert run("export", patch, "--to", "peft", "--base", other, "-o", tmp_path / "again").code == 3
    assert not (tmp_path / "again").exists()


def test_a_base_that_no_program_finds_is_noted(patch: Path, tmp_path: Path) -> None:
    made = read_patch(patch)
    named = replace(made.manifest.base, name="SmolLM2-135M-Instruct", revision=None)
    write_patch(patch, replace(made.manifest, base=named), pack(made.deltas), force=True)
    done = run("export", patch, "--to", "peft", "-o", tmp_path / "lora")
    assert done.code == 0
    assert "export with --base smollm2" in done.err
    assert "AutoPeftModelForCausalLM" not in done.err
    named = replace(named, name="my-model")
    write_patch(patch, replace(made.manifest, base=named), pack(made.deltas), force=True)
    done = run("export", patch, "--to", "peft", "-o", tmp_path / "other")
    assert "export with --base MODEL (a hub id or a directory), because my-model" in " ".join(done.err.split())


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
        ["--to", "gguf", "--base", checkpoint],
        ["--to", "peft", "--base", "modle"],
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
