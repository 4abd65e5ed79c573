"""Recovery itself fails or is killed at every operation: it can always be taken up again, and ends the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.conftest import Scenario, mixed, picture, recovered
from tests.crash.test_every_operation import ERRORS, EXHAUSTIVE, LIMIT, require_sound
from tests.support import cli, faults
from tests.support.faults import KILL, Fault

pytestmark = pytest.mark.slow

Make = Callable[[str], Scenario]


@pytest.mark.parametrize("name", ["first apply", "middle revert", "copy"])
def test_recovery_is_taken_up_again_wherever_it_stopped(tmp_path: Path, scenarios: Make, name: str) -> None:
    scenario, outcomes = scenarios(name), set()
    state, run = tmp_path / "state", tmp_path / "run"
    for number in range(2, LIMIT, 1 if EXHAUSTIVE else 17):
        killed = faults.run(scenario.copy(state), Fault(KILL, number))
        if not killed.fired:
            break
        outcomes.add(_sweep(scenario, state, run, number))
        shutil.rmtree(state)
    else:
        pytest.fail("never completed")
    assert outcomes >= ({"old"} if name == "copy" else {"old", "new"})  # a copy appears at the very last step


def _sweep(scenario: Scenario, state: Path, run: Path, turn: int) -> str:
    """Faults at every operation of a recovery from `state`; what it comes to, which is the same every time."""
    outcomes = set()
    for number in range(1, LIMIT):
        kinds = [(KILL, False), *(ERRORS if EXHAUSTIVE else [ERRORS[(number + turn) % len(ERRORS)]])]
        ends = []
        for kind, for_good in kinds:
            shutil.copytree(state, run)
            ended = faults.run(["recover", run / scenario.target], Fault(kind, number, for_good))
            require_sound(ended, kind)
            ends.append(ended)
            assert not mixed(run, scenario), ended
            outcomes.add(recovered(run, scenario, ended))
            shutil.rmtree(run)
        if not any(ended.fired for ended in ends):
            assert len(outcomes) == 1
            return outcomes.pop()
    pytest.fail("never completed")


def test_recovery_stops_where_a_new_file_is_not_what_was_decided_on(tmp_path: Path, scenarios: Make) -> None:
    scenario, stopped = scenarios("first apply"), 0
    for number in range(40, LIMIT):
        folder = tmp_path / f"run{number}"
        if not faults.run(scenario.copy(folder), Fault(KILL, number)).fired:
            break
        model = folder / "model"
        new = sorted((model / ".kpatch" / "stage").glob("*.new"))
        if not (model / ".kpatch" / "journal.json").exists() or not new:
            continue
        raw = bytearray(new[0].read_bytes())
        raw[-1] ^= 1
        new[0].write_bytes(raw)
        (model / ".kpatch" / "lock.holder").unlink(missing_ok=True)
        before = picture(folder)
        said = cli.run("recover", model)
        assert said.code == 4
        assert "neither the new one nor waiting" in said.err
        assert picture(folder) == before
        stopped += 1
    assert stopped > 4
