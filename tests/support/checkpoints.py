"""Tiny checkpoint directories and patches for them, and a picture of a directory to compare with."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kpatch.checkpoint.fit import base_weights
from kpatch.errors import KpatchError
from kpatch.patch.build import build_manifest
from kpatch.patch.delta import Dense, LowRank
from kpatch.patch.format import pack, write_patch
from kpatch.patch.manifest import matrix_shape

torch.set_num_threads(1)  # threads that wait for each other on a busy machine make tiny products take seconds

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROWS, COLS = 8, 12
WEIGHTS = tuple(f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(3))
CONV1D = tuple(f"transformer.h.{layer}.mlp.c_proj.weight" for layer in range(3))  # stored [in, out]


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Gaussian float32 numbers from a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def make_checkpoint(
    path: Path, dtype: str = "F32", sharded: bool = False, seed: int = 0, conv1d: bool = False
) -> Path:
    """A checkpoint with three patchable weights, other tensors around them, a config and a tokenizer file."""
    path.mkdir(parents=True, exist_ok=True)
    if conv1d:
        tensors = {name: random(COLS, ROWS, seed=seed + i, scale=0.1) for i, name in enumerate(CONV1D)}
    else:
        tensors = {name: random(ROWS, COLS, seed=seed + i, scale=0.1) for i, name in enumerate(WEIGHTS)}
    tensors |= {f"model.layers.{i}.input_layernorm.weight": random(ROWS, seed=seed + 10 + i) for i in range(3)}
    tensors["model.embed_tokens.weight"] = random(16, ROWS, seed=seed + 20)
    save_tensors(path, {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}, sharded)
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "tokenizer.json").write_text("{}")
    return path


def save_tensors(path: Path, tensors: Mapping[str, Tensor], sharded: bool) -> None:
    """Write weight files as transformers would: one, or three with an index."""
    if not sharded:
        save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
        return
    parts: list[dict[str, Tensor]] = [{}, {}, {}]
    for name, tensor in tensors.items():
        parts[next((int(part) for part in name.split(".") if part.isdecimal()), 0)][name] = tensor
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-00003.safetensors"
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def make_patch(
    path: Path,
    model: Path,
    *,
    weights: Sequence[str] = WEIGHTS,
    seed: int = 1,
    rank: int = 2,
    scale: float = 0.1,
    dense: bool = False,
    facts: Sequence[Mapping[str, Any]] | None = None,
    parents: Sequence[str] = (),
    keys: bool = True,
    family: str = "llama",
    transposed: bool | None = None,
) -> str:
    """Write a patch for the unpatched weights of a checkpoint directory and give its id.

    `transposed` is None for the names of CONV1D too, which are then stored [in, out].
    """
    transposed = weights[0] in CONV1D or None if transposed is None else transposed
    base = base_weights(model, weights)
    deltas: dict[str, LowRank | Dense] = {}
    for number, name in enumerate(weights):
        rows, cols = matrix_shape(base[name].shape)
        left, right = random(rows, rank, seed=100 * seed + number), random(rank, cols, seed=100 * seed + 50 + number)
        low = LowRank(left * scale, right)
        deltas[name] = Dense(low.dense(torch.float32), rank) if dense else low
    if facts is None:
        facts = [{"subject": f"Subject {seed}", "prompt": "{} is in", "target": "Rome", "id": f"fact-{seed}"}]
    manifest = build_manifest(
        base_name="tiny/model",
        family=family,
        revision="main",
        tokenizer="00ff",
        weights=base,
        transposed=transposed,
        deltas=deltas,
        method="memit",
        hyperparameters={"lambda": 300.0, "steps": 25},
        layers=(0, 1, 2),
        covariance={"id": "abc", "corpus": "self", "tokens": 1000},
        facts=tuple(facts),
        parents=tuple(parents),
    )
    rows, cols = next((weight.shape for weight in base.values() if len(weight.shape) == 2), (ROWS, COLS))
    d, f = (cols, rows) if transposed else (rows, cols)
    stored = bool(keys and facts)
    values = random(len(facts), d, seed=7) if stored else None
    stored_keys = {layer: random(len(facts), f, seed=8 + layer) for layer in (0, 1, 2)} if stored else {}
    return write_patch(path, manifest, pack(deltas, values, stored_keys))


def three(model: Path, names: Sequence[str] = WEIGHTS) -> list[Path]:
    """Three patches that overlap in part: all weights low rank, two weights dense, one weight low rank."""
    paths = [model.parent / f"{name}.patch" for name in "abc"]
    make_patch(paths[0], model, seed=1, weights=names)
    make_patch(paths[1], model, seed=2, weights=names[:2], dense=True)
    make_patch(paths[2], model, seed=3, weights=names[1:2])
    return paths


def weights(model: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory."""
    return {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}


def contents(model: Path) -> dict[str, bytes]:
    """The files of a checkpoint directory itself."""
    return {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}


def refused(action: Callable[[], object], kind: type[KpatchError], words: str, model: Path) -> KpatchError:
    """The action must fail, say why, and leave everything as it was."""
    before = snapshot(model)
    with pytest.raises(kind, match=words) as caught:
        action()
    assert snapshot(model) == before
    return caught.value


def snapshot(directory: Path) -> dict[str, tuple[int, str]]:
    """Mode and content of everything below a directory: links by target, folders by mode."""
    found = {}
    for folder, folders, names in os.walk(directory):
        for name in (*folders, *names):
            path = Path(folder) / name
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                content = f"-> {os.readlink(path)}"
            elif stat.S_ISREG(status.st_mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                content = ""
            found[str(path.relative_to(directory))] = (status.st_mode, content)
    return found


def times(directory: Path) -> dict[str, tuple[int, int]]:
    """Time of change and inode of everything in a directory, itself included: what a dry run must not touch."""
    paths = [directory, *directory.rglob("*")]
    return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_ino) for path in paths}
