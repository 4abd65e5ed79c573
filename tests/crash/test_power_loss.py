"""The power goes before the N-th operation, and with it all that was not synced."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.conftest import COMMANDS, Scenario, mixed, picture
from tests.crash.test_every_operation import EXHAUSTIVE, LIMIT
from tests.support import cli, faults
from tests.support.powerloss import KEPT, Disk

Make = Callable[[str], Scenario]


@pytest.mark.parametrize("name", COMMANDS)
def test_what_was_not_synced_is_not_needed(tmp_path: Path, scenarios: Make, name: str) -> None:
    scenario, states = scenarios(name), set()
    target = "out" if "-o" in scenario.arguments else "model"
    for number in range(1, LIMIT):
        for turn in range(20 if EXHAUSTIVE else len(KEPT)):
            ran, left = tmp_path / "ran", tmp_path / "left"
            arguments = scenario.copy(ran)
            disk = Disk(ran)
            with disk.losing(number):
                ran_to = cli.run(*arguments)
            lost = disk.count >= number
            kept = KEPT[min(turn, len(KEPT) - 1)]
            disk.write_what_is_left(left, kept, random.Random(f"{name} {number} {turn}"))
            assert not mixed(left, scenario), (number, kept)
            if picture(left) not in (scenario.old, scenario.new):
                said = cli.run("recover", left / target)
                assert said.code == 0, (number, kept, said)
            found = picture(left)
            assert found in (scenario.old, scenario.new), (number, kept, sorted(found.items() ^ scenario.new.items()))
            states.add("old" if found == scenario.old else "new")
            faults.injected["power loss"] = faults.injected.get("power loss", 0) + lost
            assert lost or (ran_to.code == 0 and found == scenario.new), "what was said to be done must last"
            shutil.rmtree(ran)
            shutil.rmtree(left)
        if not lost:
            assert number > 20
            assert states == {"old", "new"}
            return
    pytest.fail("never completed")
