"""A sharded checkpoint, and no waiting for the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kpatch.checkpoint import commit
from tests.support.checkpoints import make_checkpoint


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # the machine lives on; thousands of syncs take minutes
    monkeypatch.setattr(commit, "PAUSE", 0.0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", sharded=True)
