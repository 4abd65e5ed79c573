"""Ctrl-C and SIGKILL at any line of the program, a file size limit of the system, two writers at a time."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from kpatch import cache, parallel
from kpatch.checkpoint import files
from kpatch.checkpoint.revert import revert
from kpatch.checkpoint.status import status
from tests.crash.conftest import COMMANDS, Scenario, picture
from tests.crash.test_every_operation import settle
from tests.support import cli, faults
from tests.support.families import slow_beyond

Make = Callable[[str], Scenario]
SOURCES = (str(Path(files.__file__).parent), cache.__file__)


class Lines:
    """Counts the lines that the code around a checkpoint runs, and acts at one of them."""

    def __init__(self, number: int = 0, act: Callable[[], object] = lambda: None) -> None:
        self.number, self.act, self.seen = number, act, 0

    def start(self) -> None:
        sys.settrace(self._trace)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(SOURCES):
            return None
        if event == "line":
            self.seen += 1
            if self.seen == self.number:
                self.act()
        return self._trace


def count_lines(scenario: Scenario, folder: Path) -> int:
    lines, tracing = Lines(), sys.gettrace()
    try:
        lines.start()
        cli.run(*scenario.copy(folder))
    finally:
        sys.settrace(tracing)
    shutil.rmtree(folder)
    return lines.seen


IN_PARALLEL = parallel.in_parallel


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_fifty_signals_at_random_lines(
    tmp_path: Path, scenarios: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(parallel, "in_parallel", IN_PARALLEL)  # as it is: with threads beside the one that is hit
    number, dice, folder = getattr(signal, name), random.Random(name), tmp_path / "run"
    total = {action: count_lines(scenarios(action), folder) for action in COMMANDS}
    codes, states = [], set()
    for turn in range(50):
        action = list(COMMANDS)[turn % len(COMMANDS)]
        lines = Lines(dice.randrange(1, total[action]), lambda: signal.raise_signal(number))
        ended = faults.finish(faults.start(scenarios(action).copy(folder), before=lines.start))
        codes.append(ended.code)
        states.add(settle(folder, scenarios(action), ended))
        assert "Traceback" not in ended.err
        shutil.rmtree(folder)
    faults.injected[name] = sum(code != 0 for code in codes)
    assert set(codes) <= {0, 130 if name == "SIGINT" else -9}
    assert sum(code != 0 for code in codes) > 40
    assert states == {"old", "new"}


@pytest.mark.parametrize("name", slow_beyond(["first apply", "middle revert"], COMMANDS))
def test_files_may_not_grow_beyond_a_limit_of_the_system(tmp_path: Path, scenarios: Make, name: str) -> None:
    scenario, codes = scenarios(name), []
    for limit in (0, 1, 100, 400, 700, 1000, 1400, 2000, 2800, 5000, 1 << 20):
        folder = tmp_path / "run"
        ended = faults.finish(
            faults.start(
                scenario.copy(folder),
                before=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),  # type: ignore[misc]
            )
        )
        codes.append(ended.code)
        if ended.code:
            faults.injected["RLIMIT_FSIZE"] = faults.injected.get("RLIMIT_FSIZE", 0) + 1
            assert "larger than the system allows" in ended.err
        settle(folder, scenario, ended)
        shutil.rmtree(folder)
    assert codes[0] == 1
    assert codes[-1] == 0
    assert set(codes) == {0, 1}


def test_two_applies_at_once_do_not_meet(tmp_path: Path, scenarios: Make) -> None:
    results = []
    for turn in range(12):
        folder = tmp_path / f"run{turn}"
        scenario = scenarios("first apply")
        scenario.copy(folder)
        children = [faults.start(["apply", folder / f"{which}.patch", folder / "model"]) for which in "ab"]
        ended = dict(zip("ab", map(faults.finish, children), strict=True))
        done = sorted(which for which, end in ended.items() if end.code == 0)
        for end in ended.values():
            assert end.code in (0, 3), end
            assert end.code == 0 or "Another kpatch is working" in end.err or "changed while" in end.err
        found = status(folder / "model")
        assert found.state == "clean"
        assert sorted(patch["name"] for patch in found.patches) == done
        assert faults.lock_is_free(folder / "model")
        revert(folder / "model", all=True)
        assert picture(folder) == scenario.old
        results.append(done)
    assert all(results), "one of two must get through"
