from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from kpatch.checkpoint.apply import apply
from kpatch.checkpoint.recover import recover
from kpatch.checkpoint.revert import revert
from kpatch.checkpoint.status import history, now, status
from tests.support.checkpoints import (
    three,
    times,
)


def test_status_and_recover_do_without_torch() -> None:
    code = "import sys, kpatch.checkpoint.status, kpatch.checkpoint.recover; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_status_tells_what_is_there(model: Path) -> None:
    assert status(model).to_dict() == {
        **{"model": str(model), "state": "clean", "base": None, "patches": [], "kept_bytes": 0},
        **{"next": f"kpatch apply PATCH {model}", "changed": [], "busy": False},
    }
    a, b, _ = three(model)
    apply([b, a], model)
    found = status(model)
    assert [(patch["name"], patch["facts"]) for patch in found.patches] == [("b", 1), ("a", 1)]
    assert found.base == "tiny/model"
    assert found.kept_bytes == 3 * 8 * 12 * 4
    assert found.next == f"kpatch revert {model}"


def test_recover_has_nothing_to_do(model: Path) -> None:
    before = times(model)
    assert recover(model).outcome == "nothing"
    assert times(model) == before


def test_records_are_readable_json(model: Path) -> None:
    a, _, _ = three(model)
    apply([a], model)
    record = json.loads((model / ".kpatch" / "applied.json").read_text())
    assert record["version"] == 1
    assert [patch["name"] for patch in record["patches"]] == ["a"]
    assert "revert" in (model / ".kpatch" / "README").read_text()
    assert sorted(os.listdir(model / ".kpatch")) == ["README", "applied.json", "base", "lock", "patches"]


def test_the_log_tells_what_was_done_until_the_last_patch_goes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, c = three(model)
    times_told = iter(f"2026-01-0{day}T00:00:00Z" for day in range(1, 9))
    monkeypatch.setattr("kpatch.checkpoint.status.now", lambda: next(times_told))
    assert history(model).entries == ()
    apply([a], model)
    apply([c, b], model)
    revert(model, ["a"])
    told = history(model).to_dict()
    assert told["model"] == str(model)
    assert [(entry["time"][:10], entry["action"]) for entry in told["entries"]] == [
        *(("2026-01-01", "apply"), ("2026-01-02", "apply"), ("2026-01-03", "revert")),
    ]
    assert [[patch["name"] for patch in entry["patches"]] for entry in told["entries"]] == [["a"], ["c", "b"], ["a"]]
    apply([a], model, out=model.parent / "copy")
    assert len(history(model.parent / "copy").entries) == 4
    assert len(history(model).entries) == 3
    revert(model, all=True)
    assert history(model).entries == ()


def test_times_are_in_utc() -> None:
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", now())
    assert now()[:13] in {
        (datetime.now(timezone.utc) - timedelta(seconds=age)).strftime("%Y-%m-%dT%H") for age in (0, 60)
    }


def test_a_long_log_loses_its_oldest_entries(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, _ = three(model)
    monkeypatch.setattr("kpatch.checkpoint.status._KEPT", 3)
    apply([a], model)
    for _ in range(2):
        apply([b], model)
        revert(model)
    assert [entry.action for entry in history(model).entries] == ["revert", "apply", "revert"]
