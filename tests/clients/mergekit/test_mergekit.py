"""mergekit reads a patched checkpoint as any other, and merges the exported LoRA into the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.adapters import patch_for
from tests.support.checkpoints import weights
from tests.support.cli import run


def test_mergekit_reads_a_patched_checkpoint_and_merges_the_adapter(
    tmp_path: Path, client: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    patch, base, patched, lora = (tmp_path / name for name in ("x.patch", "model", "patched", "lora"))
    patch_for("llama", tmp_path, scale=0.1)
    for command in (
        ("apply", patch, base, "-o", patched),
        ("export", patch, "--to", "peft", "--base", base, "-o", lora),
    ):
        done = run(*command)
        assert done.code == 0, done.err
    half = {"weight": 0.5}
    merges = {
        "read": {"merge_method": "passthrough", "models": [{"model": str(patched)}]},
        "adapted": {"merge_method": "passthrough", "models": [{"model": f"{base}+{lora}"}]},
        "mean": {
            "merge_method": "linear",
            "models": [{"model": str(base), "parameters": half}, {"model": str(patched), "parameters": half}],
        },
    }
    merges = {name: {**merge, "dtype": "float32"} for name, merge in merges.items()}
    client({"merges": merges, "out": str(tmp_path / "merged")})
    plain, goal = weights(base), weights(patched)
    assert sum(not torch.equal(plain[name], goal[name]) for name in goal) == 2
    assert _largest(weights(tmp_path / "merged" / "read"), goal) == 0
    assert _largest(weights(tmp_path / "merged" / "adapted"), goal) < 1e-5
    mean = {name: (plain[name] + goal[name]) / 2 for name in goal}
    assert _largest(weights(tmp_path / "merged" / "mean"), mean) < 1e-5


def _largest(found: dict[str, Tensor], goal: dict[str, Tensor]) -> float:
    """The largest difference of an entry; an untied head that repeats the embeddings may be missing."""
    assert set(found) == set(goal)
    return max(float((found[name] - goal[name]).abs().max()) for name in goal)
