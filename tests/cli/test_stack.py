"""`kpatch stack` from the outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import checkpoints
from tests.support.cli import run


@pytest.fixture
def second(tmp_path: Path, checkpoint: Path) -> Path:
    path = tmp_path / "more.patch"
    checkpoints.make_patch(path, checkpoint, seed=2)
    return path


def test_stack_then_show_verify_apply_revert(patch: Path, second: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.patch"
    done = run("stack", patch, second, "-o", out)
    assert done.code == 0
    assert "2 facts of 2 patches, 3 weights, rank 4" in done.out
    assert "moves keys of" in done.out
    shown = run("show", out)
    assert shown.code == 0
    for said in ("stack", "Subject 1 is in", "Subject 2 is in", "holds"):
        assert said in shown.out, said
    assert run("verify", out, checkpoint).code == 0
    before = checkpoints.snapshot(checkpoint)
    assert run("apply", out, checkpoint).code == 0
    assert run("apply", second, checkpoint).code == 3  # it is in there already
    assert run("revert", checkpoint).code == 0
    assert checkpoints.snapshot(checkpoint) == before


def test_the_json_of_stack(patch: Path, second: Path, tmp_path: Path) -> None:
    out = tmp_path / "both.patch"
    data = run("stack", patch, second, "--scale", "1", "--scale", "0.5", "-o", out, "--json").json
    assert data["patch"]["path"] == str(out)
    assert data["patch"]["bytes"] == out.stat().st_size
    assert [(one["name"], one["scale"], one["facts"]) for one in data["patches"]] == [
        ("news", 1.0, 1),
        ("more", 0.5, 1),
    ]
    assert [fact["text"] for fact in data["facts"]] == ["Subject 1 is in", "Subject 2 is in"]
    assert (data["parents"], data["repeated"]) == ([], [])
    assert [weight["rank"] for weight in data["weights"]] == [4, 4, 4]
    ids = [one["id"] for one in data["patches"]]
    assert {(one["by"], one["on"]) for one in data["interference"]} == {(ids[0], ids[1]), (ids[1], ids[0])}
    assert [one["layer"] for one in data["interference"]] == [0, 1, 2, 0, 1, 2]
    assert data["interference"][0]["ratio"] > 0
    assert data["interference"][0]["worst"]["fact"] == "Subject 2 is in"


def test_check_writes_nothing(patch: Path, second: Path, tmp_path: Path) -> None:
    before = checkpoints.snapshot(tmp_path)
    done = run("stack", patch, second, "--check")
    assert done.code == 0
    assert "nothing was written" in done.out
    assert run("stack", patch, second, "--check", "--json").json["patch"] is None
    assert checkpoints.snapshot(tmp_path) == before


def test_much_interference_is_warned_of(patch: Path, second: Path, tmp_path: Path) -> None:
    done = run("stack", patch, second, "--scale", "0.01", "--scale", "100", "--check")
    assert "warning: more moves keys of news" in done.err
    assert "warning: news" not in done.err


def test_what_is_refused(patch: Path, second: Path, checkpoint: Path, tmp_path: Path) -> None:
    assert run("stack", patch, second).code == 2
    assert run("stack", patch, second, "--check", "-o", "x").code == 2
    assert run("stack", patch, second, "--scale", "1", "--check").code == 2
    assert run("stack", patch, second, "--scale", "one", "--check").code == 2
    assert run("stack", tmp_path / "none.patch", "--check").code == 2
    assert run("stack", patch, patch, "--check").code == 3
    assert run("stack", patch, second, "-o", second).code == 3
    other = tmp_path / "oslo.patch"
    checkpoints.make_patch(
        other, checkpoint, seed=3, facts=[{"subject": "Subject 1", "prompt": "{} is in", "target": "Oslo"}]
    )
    done = run("stack", patch, other, "-o", tmp_path / "x.patch")
    assert (done.code, done.out) == (3, "")
    assert "news (" in done.err
    assert "oslo (" in done.err
    assert not (tmp_path / "x.patch").exists()
    second.write_bytes(second.read_bytes()[:-4])
    assert run("stack", patch, second, "--check").code == 4
