"""Patches for two layers of a tiny model, of several ranks, to be exported as adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from kpatch.models.model import Model
from kpatch.patch.delta import LowRank
from kpatch.patch.format import pack, read_patch, write_patch
from tests.support import checkpoints
from tests.support.checkpoints import random
from tests.support.models import tiny

LAYERS = (0, 2)


def patch_for(
    family: str, folder: Path, ranks: tuple[int, ...] = (2, 5), keys: bool = True, scale: float = 1.0, **options: Any
) -> Path:
    """A patch for W of two layers of a tiny model that is saved as folder/model, one delta of each rank."""
    model = tiny(family)
    directory = folder / "model"
    model.net.save_pretrained(directory)
    model.tokenizer.save_pretrained(directory)
    return patch_of(model, directory, folder / "x.patch", ranks, keys, scale, **options)


def patch_of(
    model: Model,
    directory: Path,
    path: Path,
    ranks: tuple[int, ...] = (2, 5),
    keys: bool = True,
    scale: float = 1.0,
    **options: Any,
) -> Path:
    """A patch for W of two layers of a model that is saved in `directory`, one delta of each rank."""
    names = [model.weight_name(layer) for layer in LAYERS]
    transposed, family = model.stores_transposed, model.family.model_type
    checkpoints.make_patch(path, directory, weights=names, keys=False, family=family, transposed=transposed, **options)
    made = read_patch(path)
    deltas, infos = {}, {}
    for name, rank in zip(names, ranks, strict=True):
        rows, cols = model.net.get_parameter(name).shape
        deltas[name] = LowRank(random(rows, rank, seed=rank, scale=scale), random(rank, cols, seed=rank + 1))
        infos[name] = replace(made.manifest.deltas[name], form="lowrank", rank=rank)
    facts = len(made.manifest.facts)
    stored = {layer: random(facts, model.mlp_width, seed=layer) for layer in LAYERS} if keys else {}
    manifest = replace(made.manifest, deltas=infos, layers=LAYERS)
    write_patch(path, manifest, pack(deltas, None, stored), force=True)
    return path
