"""The power goes before the N-th operation, and with it what was not synced; then perhaps again, during recovery."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.conftest import COMMANDS, Scenario, mixed, picture, recovered
from tests.crash.test_every_operation import EXHAUSTIVE
from tests.support import cli, faults
from tests.support.powerloss import KEPT, Disk, write

pytestmark = pytest.mark.slow

Make = Callable[[str], Scenario]
TURNS = 20 if EXHAUSTIVE else len(KEPT)


def run(folder: Path, arguments: list[str]) -> Disk:
    """Run a command on a folder whose disk is watched; give that."""
    disk = Disk(folder, TURNS)
    with disk.watching():
        ran = cli.run(*arguments)
    assert ran.code == 0, ran
    return disk


def check(disk: Disk, scenario: Scenario, folder: Path, about: object) -> set[str]:
    """Whatever a loss left must be sound after one further command. Which states were found."""
    states = set()
    for tree, when in disk.left.items():
        write(tree, folder)
        assert not mixed(folder, scenario), (about, when)
        states.add(recovered(folder, scenario, (about, when)))
        shutil.rmtree(folder)
    faults.injected["power loss"] = faults.injected.get("power loss", 0) + disk.losses
    return states


@pytest.mark.parametrize("name", COMMANDS)
def test_what_was_not_synced_is_not_needed(tmp_path: Path, scenarios: Make, name: str) -> None:
    scenario = scenarios(name)
    disk = run(tmp_path / "run", scenario.copy(tmp_path / "run"))
    assert disk.losses > 100
    assert check(disk, scenario, tmp_path / "left", name) == {"old", "new"}
    for tree in disk.now():
        write(tree, tmp_path / "done")
        assert recovered(tmp_path / "done", scenario, name) == "new", "what was said to be done must last"
        shutil.rmtree(tmp_path / "done")


@pytest.mark.parametrize("name", COMMANDS)
def test_recovery_needs_nothing_that_was_not_synced(tmp_path: Path, scenarios: Make, name: str) -> None:
    scenario, states = scenarios(name), set()
    first = run(tmp_path / "run", scenario.copy(tmp_path / "run"))
    for number, (tree, when) in enumerate(first.left.items()):
        folder = tmp_path / f"again{number}"
        write(tree, folder)
        if picture(folder) in (scenario.old, scenario.new) or not (EXHAUSTIVE or number % 6 == 0):
            continue
        disk = run(folder, ["recover", str(folder / scenario.target)])
        states |= check(disk, scenario, tmp_path / "left", when)
        shutil.rmtree(folder)
    assert states >= ({"old"} if "copy" in name else {"old", "new"})
