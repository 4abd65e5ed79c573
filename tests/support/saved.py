"""What a run of the command line needs on disk: a tiny model, facts, and a patch that is felt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.support import checkpoints
from tests.support.models import tiny


def save_model(folder: Path) -> Path:
    """A tiny Llama as a checkpoint directory."""
    torch.set_num_threads(1)
    made = tiny("llama")
    made.net.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


def save_facts(path: Path, facts: Sequence[Any]) -> Path:
    path.write_text(json.dumps({"facts": facts}), encoding="utf-8")
    return path


def save_patch(path: Path, model: Path) -> Path:
    """A patch that turns the model upside down."""
    weights = [tiny("llama").weight_name(layer) for layer in (0, 1, 2)]
    checkpoints.make_patch(path, model, weights=weights, scale=2.0, keys=False)
    return path
