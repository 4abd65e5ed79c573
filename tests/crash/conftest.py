"""Checkpoints of three files to break, the states they may be found in afterwards, and a count of the faults."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kpatch import parallel
from kpatch.checkpoint import commit, status
from kpatch.checkpoint.apply import apply
from tests.support import cli, faults, rows
from tests.support.checkpoints import make_checkpoint, make_patch, snapshot

Picture = dict[str, tuple[int, str]]


def picture(folder: Path) -> Picture:
    """Everything below a folder but locks, which stay while something is applied."""
    return {name: value for name, value in snapshot(folder).items() if not name.endswith("/.kpatch/lock")}


@dataclass(frozen=True)
class Scenario:
    """A command on a folder with checkpoint `model` and patches a and b: what the folder is before and after it."""

    template: Path
    arguments: tuple[str, ...]
    old: Picture
    new: Picture

    @property
    def target(self) -> str:
        """The directory that is written."""
        return "out" if "-o" in self.arguments else "model"

    def copy(self, folder: Path) -> list[str]:
        """A fresh copy of the template, and the command line for it."""
        shutil.copytree(self.template, folder, symlinks=True)
        return [argument.replace("@", f"{folder}/") for argument in self.arguments]


def mixed(folder: Path, scenario: Scenario) -> bool:
    """Whether a loader would find weight files of both states, or some of them and nothing that stops it."""
    found, seen = picture(folder), set()
    changed = [name for name, value in scenario.old.items() if scenario.new.get(name) != value]
    weights = [name for name in changed if name.startswith("model/model-")]
    for name in weights:
        seen.add("missing" if name not in found else "old" if found[name] == scenario.old[name] else "new")
        assert found.get(name) in (None, scenario.old[name], scenario.new.get(name)), name
    closed_sign = "model/config.json" not in found
    return {"old", "new"} <= seen or (len(seen) > 1 and not closed_sign)


def recovered(folder: Path, scenario: Scenario, about: object) -> str:
    """One further command where one is needed; then the folder must be as before or as after the run, and what was
    said of it must be so. Says which it is."""
    said = "nothing"
    if picture(folder) not in (scenario.old, scenario.new):
        ran = cli.run("recover", folder / scenario.target, "--json")
        assert ran.code == 0, (about, ran)
        said = ran.json["outcome"]
    found = picture(folder)
    assert found in (scenario.old, scenario.new), (about, sorted(found.items() ^ scenario.new.items()))
    state = "old" if found == scenario.old else "new"
    assert state == {"undone": "old", "completed": "new"}.get(said, state), about
    return state


# Arguments with @ are paths in the scenario's folder.
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "first apply": ("", ("apply", "@a.patch", "@model")),
    "second apply": ("a", ("apply", "@b.patch", "@model")),
    "middle revert": ("ab", ("revert", "a", "@model")),
    "revert all": ("ab", ("revert", "--all", "@model")),
    "one file": ("", ("apply", "@a.patch", "@model")),
    "copy": ("a", ("apply", "@b.patch", "@model", "-o", "@out")),
    "solved together": ("a", ("apply", "@b.patch", "@model", "--replace")),
    "taken apart": ("ab", ("revert", "b", "@model")),
    "float32 copy": ("a", ("apply", "@b.patch", "@model", "-o", "@out", "--dtype", "float32")),
}

# Scenarios whose patches are solved together
BY_ROW = ("solved together", "taken apart")


def _set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # the machine lives on
    monkeypatch.setattr(commit, "PAUSE", 0.0)
    monkeypatch.setattr(status, "now", lambda: "2026-01-01T00:00:00Z")
    monkeypatch.setattr(parallel, "in_parallel", faults.one_by_one)


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch)


@pytest.fixture(scope="session")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Scenario]:
    """The scenario of a name in COMMANDS; templates and pictures are made once."""
    faults.warm_up(tmp_path_factory.mktemp("warm"))
    made: dict[str, Scenario] = {}

    def make(name: str) -> Scenario:
        with pytest.MonkeyPatch.context() as monkeypatch:
            _set(monkeypatch)
            return _made(name)

    def _made(name: str) -> Scenario:
        if name not in made:
            applied, arguments = COMMANDS[name]
            template = tmp_path_factory.mktemp("template") / "at"
            template.mkdir()
            model = make_checkpoint(template / "model", "BF16", sharded=name != "one file")
            for seed, which in enumerate("ab"):
                if name in BY_ROW:  # b says otherwise of one of a's facts
                    facts, subjects = rows.facts_of(2, seed), ["both", which]
                    rows.write_rows(template / f"{which}.patch", model, facts, subjects, targets=[which, which])
                else:
                    make_patch(template / f"{which}.patch", model, seed=seed)
            if applied:
                apply([template / f"{which}.patch" for which in applied], model, replace=name in BY_ROW)
            old = picture(template)
            after = Scenario(template, arguments, old, {})
            folder = template.parent / "after"
            ended = faults.run(after.copy(folder))
            assert ended.code == 0, ended.err
            made[name] = Scenario(template, arguments, old, picture(folder))
        return made[name]

    return make


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many faults were injected."""
    if faults.injected:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(faults.injected.items()))
        terminalreporter.write_line(f"faults injected: {sum(faults.injected.values()):,} ({kinds})")
