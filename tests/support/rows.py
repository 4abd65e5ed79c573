"""Patches stored by rows for tiny checkpoints: solved with a C at hand, as `make` solves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kpatch.checkpoint.fit import base_weights
from kpatch.patch.build import build_manifest
from kpatch.patch.delta import Delta, LowRank
from kpatch.patch.format import pack, write_patch
from tests.oracle import stacking as plain
from tests.support.checkpoints import COLS, CONV1D, ROWS, WEIGHTS

Facts = Mapping[int, list[plain.Fact]]  # by layer


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(layer: int) -> Tensor:
    root = numbers(COLS, 3 * COLS, seed=layer)
    return root @ root.T / (3 * COLS) * 5


def facts_of(count: int, seed: int) -> Facts:
    """Keys that have a part in common, so that they meet, and residuals."""
    found = {}
    for layer in range(3):
        keys = numbers(COLS, seed=900 + layer) + numbers(count, COLS, seed=seed * 10 + layer)
        found[layer] = list(zip(keys, 0.1 * numbers(count, ROWS, seed=seed * 10 + 5 + layer), strict=True))
    return found


def write_rows(
    path: Path,
    model: Path,
    facts: Facts,
    subjects: Sequence[str],
    *,
    targets: Sequence[str] | None = None,
    weights: Sequence[str] = WEIGHTS,
    held: Facts | None = None,
    parents: Sequence[str] = (),
    prompt: str = "{} is in",
) -> str:
    """Write a patch with a fact for each subject and give its id; `held` are the facts of its parents."""
    base = base_weights(model, weights)
    deltas: dict[str, Delta] = {}
    keys: dict[int, Tensor] = {}
    for name in weights:
        layer = next(int(part) for part in name.split(".") if part.isdecimal())
        c = plain.with_keys(covariance(layer), held[layer] if held else [])
        left, right, keys[layer] = plain.factors(c, facts[layer])
        low = LowRank(left.float(), right.float())
        deltas[name] = low.transposed() if name in CONV1D else low
    targets = targets or ["Rome"] * len(subjects)
    manifest = build_manifest(
        base_name="tiny/model",
        family="gpt2" if weights[0] in CONV1D else "llama",
        weights=base,
        deltas=deltas,
        by_row=weights,
        method="memit",
        layers=sorted(keys),
        facts=[
            {"subject": subject, "prompt": prompt, "target": target}
            for subject, target in zip(subjects, targets, strict=True)
        ],
        parents=parents,
    )
    return write_patch(path, manifest, pack(deltas, numbers(len(subjects), ROWS, seed=1), keys))
