"""A small checkpoint directory and patches for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kpatch.patch.format import pack, read_patch, write_patch
from tests.support import checkpoints

_RATE = {"success": 1.0, "magnitude": 0.5, "accuracy": 1.0, "n": 1, "compared": 1}
_NONE = {"generalization": None, "specificity": None, "score": None}
EFFECT = {
    "before": {"efficacy": {**_RATE, "success": 0.0}, **_NONE},
    "after": {"efficacy": _RATE, **_NONE},
    "facts": [
        {
            "text": "Subject 1 is in",
            "target": "Rome",
            "was": "Paris",
            "before": {"answer": "Paris", "probability": 0.0125},
            "after": {"answer": "Rome", "probability": 0.9876},
        }
    ],
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return checkpoints.make_checkpoint(tmp_path / "model")


@pytest.fixture
def patch(tmp_path: Path, checkpoint: Path) -> Path:
    """A patch that fits the checkpoint, with an effect as `make` measures it."""
    path = tmp_path / "news.patch"
    checkpoints.make_patch(path, checkpoint, scale=0.01)
    made = read_patch(path)
    write_patch(path, replace(made.manifest, effect=EFFECT), pack(made.deltas, made.values, made.keys), force=True)
    return path


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    path = tmp_path / "facts.yaml"
    path.write_text("facts:\n- {subject: Eiffel Tower, prompt: '{} is in', target: Rome}\n", encoding="utf-8")
    return path
