"""The N-th file operation fails, or kills the process, for N = 1, 2, … until the run completes.

After each, at most one further command must give exactly the old or exactly the new bytes, with no stray file and the
lock free. KPATCH_CRASH=all runs every kind of error at every operation; by default they take turns.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.conftest import COMMANDS, Scenario, mixed, recovered
from tests.support import faults
from tests.support.faults import KILL, Ended, Fault

pytestmark = pytest.mark.slow

EXHAUSTIVE = os.environ.get("KPATCH_CRASH") == "all"
ERRORS = [(kind, for_good) for for_good in (False, True) for kind in ("EIO", "ENOSPC", "EACCES")]
LIMIT = 2000  # operations; no run has so many

Make = Callable[[str], Scenario]


def require_sound(ended: Ended, kind: str) -> None:
    """A child that was not killed ends with an exit code of the table and with words."""
    if ended.code == -9:
        assert kind == KILL
        return
    assert ended.code in (0, 1, 2, 3, 4), ended
    for word in ("Traceback", "this is a bug"):
        assert word not in ended.err, ended
    assert ended.code == 0 or any(line.startswith("error:") for line in ended.err.splitlines()), ended


def settle(folder: Path, scenario: Scenario, ended: Ended) -> str:
    """One further command; then the folder must be as before or as after the run. Says which."""
    assert not mixed(folder, scenario), ended
    state = recovered(folder, scenario, ended)
    assert ended.code != 0 or state == "new", ended
    for model in ("model", "out"):
        assert faults.lock_is_free(folder / model)
    return state


def sweep(folder: Path, scenario: Scenario, kind: str, for_good: bool, numbers: range) -> set[str]:
    """Faults at these operations, until the run completes; the states found afterwards."""
    states = set()
    for number in numbers:
        arguments = scenario.copy(folder)
        ended = faults.run(arguments, Fault(kind, number, for_good))
        require_sound(ended, kind)
        states.add(settle(folder, scenario, ended))
        shutil.rmtree(folder)
        if not ended.fired:
            assert number > 20
            return states
    pytest.fail("never completed")


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_every_operation(tmp_path: Path, scenarios: Make, name: str) -> None:
    assert sweep(tmp_path / "run", scenarios(name), KILL, False, range(1, LIMIT)) == {"old", "new"}


@pytest.mark.parametrize("turn", range(len(ERRORS)))
@pytest.mark.parametrize("name", COMMANDS)
def test_an_error_at_every_operation(tmp_path: Path, scenarios: Make, name: str, turn: int) -> None:
    numbers = range(1, LIMIT) if EXHAUSTIVE else range(1 + turn, LIMIT, len(ERRORS))
    assert sweep(tmp_path / "run", scenarios(name), *ERRORS[turn], numbers) == {"old", "new"}
