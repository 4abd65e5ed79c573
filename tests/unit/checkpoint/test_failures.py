"""What is said and done when a disk is full, a lock is held or a run was broken off.

tests/crash breaks it off at every step; here are the answers to a user.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kpatch import parallel
from kpatch.checkpoint import files
from kpatch.checkpoint.apply import apply
from kpatch.checkpoint.fit import base_weights, verify_fit
from kpatch.checkpoint.recover import recover
from kpatch.checkpoint.revert import revert
from kpatch.checkpoint.status import status
from kpatch.errors import BadInput, Damaged, KpatchError, Refused
from kpatch.patch.header import read_header
from tests.support.checkpoints import WEIGHTS, make_checkpoint, make_patch, refused, snapshot, three, weights
from tests.support.faults import OPERATIONS, one_by_one

ROOT = Path(__file__).resolve().parents[3]


class Killed(BaseException):
    """The process is gone: no operation after this one happens."""


@contextmanager
def failing(number: int, error: Callable[[], BaseException], *, for_good: bool) -> Iterator[list[str]]:
    """The `number`-th operation raises instead of happening, and every later one too when `for_good`."""
    done: list[str] = []

    def wrap(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            if len(done) == number or (for_good and len(done) > number):
                raise error()
            return operation(*args, **kwargs)

        return wrapped

    originals = {name: getattr(files, name) for name in OPERATIONS}
    in_parallel = parallel.in_parallel
    try:
        for name, operation in originals.items():
            setattr(files, name, wrap(name, operation))
        parallel.in_parallel = one_by_one
        yield done
    finally:
        parallel.in_parallel = in_parallel
        for name, operation in originals.items():
            setattr(files, name, operation)


ACTIONS = ["first apply"]


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Per action, a folder with patches a and b and the checkpoint the action starts from."""
    found = {}
    for action in ACTIONS:
        folder = found[action] = tmp_path_factory.mktemp("template")
        model = make_checkpoint(folder / "model", "BF16", sharded=True)
        paths = [folder / f"{name}.patch" for name in "ab"]
        for seed, path in enumerate(paths):
            make_patch(path, model, seed=seed)
        if action != "first apply":
            apply(paths[:1] if action == "second apply" else paths, model)
    return found


Scenario = Callable[[Path, str], tuple[Path, Callable[[], object]]]


@pytest.fixture
def scenario(templates: dict[str, Path]) -> Scenario:
    """Copies an action's template to a new folder; gives the checkpoint and the action itself."""

    def make(folder: Path, action: str) -> tuple[Path, Callable[[], object]]:
        shutil.copytree(templates[action], folder, dirs_exist_ok=True)
        model, a, b = folder / "model", folder / "a.patch", folder / "b.patch"
        runs: dict[str, Callable[[], object]] = {
            "first apply": lambda: apply([a], model),
            "second apply": lambda: apply([b], model),
            "middle revert": lambda: revert(model, ["a"]),
            "revert all": lambda: revert(model, all=True),
        }
        return model, runs[action]

    return make


def _decided(scenario: Scenario, folder: Path) -> int:
    """The number of the first operation of a first apply that renames a weight file."""
    _, run = scenario(folder, "first apply")
    with failing(10**9, Killed, for_good=True) as done:
        run()
    journal = max(number for number, name in enumerate(done) if name == "create" and number < len(done) - 20)
    return next(number for number in range(journal, len(done)) if done[number : number + 2] == ["replace"] * 2) + 1


def test_an_interrupted_checkpoint_is_ended_by_the_next_command(tmp_path: Path, scenario: Scenario) -> None:
    model, run = scenario(tmp_path, "first apply")
    make_patch(tmp_path / "c.patch", model, seed=5)
    with pytest.raises(Killed), failing(_decided(scenario, tmp_path / "probe"), Killed, for_good=True):
        run()
    for look in (
        lambda: apply([tmp_path / "c.patch"], model, check=True),
        lambda: apply([tmp_path / "c.patch"], model, out=tmp_path / "out"),
        lambda: revert(model, check=True),
        lambda: verify_fit(tmp_path / "c.patch", model),
        lambda: base_weights(model, WEIGHTS),
    ):
        with pytest.raises(Damaged, match="interrupted"):
            look()
    apply([tmp_path / "c.patch"], model)
    assert [patch["name"] for patch in status(model).patches] == ["a", "c"]


def test_a_full_disk_is_foreseen(tmp_path: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    model, run = scenario(tmp_path, "first apply")
    before = snapshot(model)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(KpatchError, match="Not enough space"):
        run()
    assert snapshot(model) == before


def first(operation: str, model: Path, patch: Path) -> int:
    """Which of an apply's file operations is the first of a kind, counted from 1."""
    with failing(10**9, Killed, for_good=True) as done:
        apply([patch], model)
        revert(model)
    return done.index(operation) + 1


def test_a_full_disk_is_told_in_words(tmp_path: Path, scenario: Scenario) -> None:
    model, run = scenario(tmp_path, "first apply")
    before = snapshot(model)
    place = first("reserve", model, tmp_path / "a.patch")
    with (
        pytest.raises(KpatchError, match="No space left") as caught,
        failing(place, lambda: OSError(errno.ENOSPC, "No space left on device"), for_good=False),
    ):
        run()
    assert not isinstance(caught.value, (Refused, Damaged, BadInput))
    assert snapshot(model) == before


def test_a_folder_that_may_not_be_written_is_told_in_words(tmp_path: Path, scenario: Scenario) -> None:
    model, run = scenario(tmp_path, "first apply")
    before = snapshot(model)
    place = first("mkdir", model, tmp_path / "a.patch")
    denied = lambda: PermissionError(errno.EACCES, "Permission denied", str(model / ".kpatch"))  # noqa: E731
    with pytest.raises(KpatchError) as caught, failing(place, denied, for_good=False):
        run()
    assert caught.value.details == ("Permission denied",)
    assert snapshot(model) == before


HOLD = """
import sys
from pathlib import Path
from kpatch.checkpoint.commit import writing
from kpatch.checkpoint.store import Store
with writing(Store(Path(sys.argv[1]))):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_kpatch(model: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the checkpoint's lock."""
    command = [sys.executable, "-c", HOLD, str(model)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_one_writer_at_a_time(tmp_path: Path, scenario: Scenario) -> None:
    model, run = scenario(tmp_path, "first apply")
    before = snapshot(model)
    with another_kpatch(model) as process:
        with pytest.raises(Refused, match="Another kpatch is working on") as caught:
            run()
        assert str(process.pid) in caught.value.details[0]
        assert status(model).busy
        apply([tmp_path / "a.patch"], model, check=True)
        process.communicate("")  # lets go
    assert snapshot(model) == before
    run()
    assert not status(model).busy


def test_a_killed_holder_frees_the_lock(tmp_path: Path, scenario: Scenario) -> None:
    model, run = scenario(tmp_path, "first apply")
    with another_kpatch(model) as process:
        process.kill()
        process.wait()
        assert not status(model).busy
    run()
    revert(model)
    assert not (model / ".kpatch").exists()


def test_a_checkpoint_that_changes_meanwhile_is_left_alone(
    tmp_path: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kpatch.checkpoint import apply as module

    model, run = scenario(tmp_path, "first apply")
    file = model / "model-00001-of-00003.safetensors"
    checked = module.carry_out

    def meddle(*args: Any) -> Any:
        os.utime(file, ns=(1, 1))
        return checked(*args)

    monkeypatch.setattr(module, "carry_out", meddle)
    before = snapshot(model)
    with pytest.raises(Refused, match="changed while it was being checked"):
        run()
    assert snapshot(model) == before


def test_a_checkpoint_that_changes_while_new_files_are_staged_is_left_alone(
    tmp_path: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kpatch.checkpoint import apply as module

    model, run = scenario(tmp_path, "first apply")
    file = model / "model-00001-of-00003.safetensors"
    staged = module.stage_files
    written: list[dict[str, Any]] = []

    def meddle(*args: Any) -> Any:
        outcomes = staged(*args)
        with file.open("r+b") as handle:  # another program writes to the checkpoint in these minutes
            handle.seek(-1, os.SEEK_END)
            handle.write(b"x")
        written.append(snapshot(model))
        return outcomes

    monkeypatch.setattr(module, "stage_files", meddle)
    with pytest.raises(Refused, match="changed while it was being checked"):
        run()
    left = snapshot(model)
    assert left == {name: state for name, state in written[0].items() if not name.startswith(".kpatch")}
    assert file.read_bytes().endswith(b"x")


def test_a_patch_that_changes_after_it_was_copied_is_applied_as_it_was(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is checked, and the deltas are read from it, each tensor hashed once."""
    a, b, _ = three(model)
    apply([a], model)
    expected, identity = weights(model), read_header(a).id
    revert(model)
    copied, hashed = files.copy_file, list[str]()

    def meddle(source: Path, target: Path, *args: Any, **options: Any) -> None:
        copied(source, target, *args, **options)
        if source == a:
            source.write_bytes(b.read_bytes())

    monkeypatch.setattr(files, "copy_file", meddle)
    monkeypatch.setattr("kpatch.patch.format.sha256_of", lambda data: hashed.append("again"))
    apply([a], model)
    assert read_header(a).id != identity
    assert [patch["id"] for patch in status(model).patches] == [identity]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(model).items())
    assert hashed == []


@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize(("size", "words"), [(None, "changed while it was being read"), (-1, "is damaged: tensor")])
def test_a_patch_is_checked_in_the_copy_before_a_weight_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: bool, size: int | None, words: str
) -> None:
    a, b, _ = three(model)
    copied = files.copy_file

    def meddle(source: Path, target: Path, *args: Any, **options: Any) -> None:
        if source == a:
            source.write_bytes(b.read_bytes() if size is None else a.read_bytes()[:size] + b"\x01")
        copied(source, target, *args, **options)

    monkeypatch.setattr(files, "copy_file", meddle)
    place = {"out": tmp_path / "copy"} if out else {}
    error = refused(lambda: apply([a], model, **place), Damaged, words, model)
    assert str(a) in error.message
    assert not (tmp_path / "copy").exists()


def test_a_staged_file_that_was_tampered_with_is_not_put_in_place(tmp_path: Path, scenario: Scenario) -> None:
    model, run = scenario(tmp_path, "first apply")
    with pytest.raises(Killed), failing(_decided(scenario, tmp_path / "probe"), Killed, for_good=True):
        run()
    staged = sorted((model / ".kpatch" / "stage").iterdir())[-1]
    staged.write_bytes(b"short")
    before = snapshot(model)
    with pytest.raises(Damaged, match="neither the new one"):
        recover(model)
    assert json.loads((model / ".kpatch" / "journal.json").read_text())["action"] == "apply"
    assert {n: v for n, v in snapshot(model).items() if n.endswith(staged.name)} == {
        n: v for n, v in before.items() if n.endswith(staged.name)
    }
