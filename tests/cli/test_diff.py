"""`kpatch diff` from the outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import checkpoints
from tests.support.cli import run


@pytest.fixture
def newer(tmp_path: Path, checkpoint: Path) -> Path:
    path = tmp_path / "newer.patch"
    facts = [
        {"subject": "Subject 1", "prompt": "{} is in", "target": "Oslo", "id": "fact-1"},
        {"subject": "Subject 2", "prompt": "{} is in", "target": "\x1b[2JLima", "id": "fact-2"},
    ]
    checkpoints.make_patch(path, checkpoint, seed=2, facts=facts)
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
