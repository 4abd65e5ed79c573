"""Whoever loads the checkpoint while patches come and go gets the old weights, the new ones, or a closed door."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from kpatch.checkpoint import commit
from kpatch.errors import KpatchError
from kpatch.models.address import resolve
from tests.crash.conftest import Scenario
from tests.support import cli, faults
from tests.support.checkpoints import WEIGHTS

Make = Callable[[str], Scenario]
PAUSE = 0.1


def read(model: Path, *, look_at_config: bool) -> list[bytes] | None:
    """The three patched weights as a loader gets them: all files opened first, then read. None when it was too slow
    for what is promised; raises FileNotFoundError at a closed checkpoint."""
    if look_at_config:
        json.loads((model / "config.json").read_text())
    table = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    begin = time.monotonic()
    opened = {name: safe_open(model / name, "pt") for name in sorted(set(table.values()))}
    if time.monotonic() - begin >= PAUSE:
        return None
    return [opened[table[name]].get_tensor(name).view(-1).float().numpy().tobytes() for name in WEIGHTS]


def put_on_and_take_off(folder: Path) -> None:
    """In a child, until it is killed."""
    commit.PAUSE = PAUSE
    while True:
        for arguments in (["apply", folder / "a.patch", folder / "model"], ["revert", folder / "model"]):
            assert cli.run(*arguments).code == 0
            time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("look_at_config", [True, False])
def test_two_hundred_loads_meanwhile(tmp_path: Path, scenarios: Make, look_at_config: bool) -> None:
    folder = tmp_path / "run"
    scenarios("first apply").copy(folder)
    model = folder / "model"
    old = read(model, look_at_config=True)
    cli.run("apply", folder / "a.patch", model)
    new = read(model, look_at_config=True)
    cli.run("revert", model)
    assert old is not None
    assert new is not None
    assert old != new
    child = faults.start([], before=lambda: put_on_and_take_off(folder))
    seen = {"old": 0, "new": 0, "closed": 0, "slow": 0}
    try:
        while seen["old"] + seen["new"] < 200 or not seen["closed"]:
            try:
                found = read(model, look_at_config=look_at_config)
            except (FileNotFoundError, RuntimeError) as error:  # the library has its own error for a file that goes
                if "No such file" not in str(error):
                    raise
                seen["closed"] += 1
                continue
            assert found in (old, new, None), "a mix of old and new"
            seen["slow" if found is None else "old" if found == old else "new"] += 1
            time.sleep(0.002)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        faults.finish(child)
    assert seen["old"] > 20
    assert seen["new"] > 20


def test_a_program_that_has_the_files_open_keeps_them(tmp_path: Path, scenarios: Make) -> None:
    folder = tmp_path / "run"
    scenarios("first apply").copy(folder)
    model = folder / "model"
    opened = {path.name: safe_open(path, "pt") for path in sorted(model.glob("*.safetensors"))}
    table = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    before = read(model, look_at_config=True)
    assert cli.run("apply", folder / "a.patch", model).code == 0
    assert read(model, look_at_config=True) != before
    held = [opened[table[name]].get_tensor(name).view(-1).float().numpy().tobytes() for name in WEIGHTS]
    assert held == before


def test_a_checkpoint_left_closed_says_what_to_do(tmp_path: Path, scenarios: Make) -> None:
    scenario, told = scenarios("first apply"), 0
    for number in range(50, 2000, 3):
        folder = tmp_path / f"run{number}"
        if not faults.run(scenario.copy(folder), faults.Fault(faults.KILL, number)).fired:
            break
        model = folder / "model"
        if (model / "config.json").exists():
            continue
        assert (model / commit.SIGN).exists()
        with pytest.raises(KpatchError, match="interrupted apply"):
            resolve(str(model))
        said = cli.run("status", model, "--json").json
        assert (said["state"], said["next"]) == ("interrupted", f"kpatch recover {model}")
        told += 1
    assert told > 2
