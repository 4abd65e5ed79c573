"""Work beside other work: threads that copy and compute, and what becomes of their errors."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path

import pytest

from kpatch.checkpoint import files
from kpatch.checkpoint.apply import apply
from kpatch.checkpoint.revert import revert
from kpatch.errors import KpatchError
from tests.support.checkpoints import (
    WEIGHTS,
    contents,
    make_checkpoint,
    make_patch,
    refused,
    save_tensors,
    snapshot,
    three,
    weights,
)


def test_background_work_is_waited_for_and_its_error_raised() -> None:
    done: list[str] = []

    def work(stopped: object) -> None:
        time.sleep(0.02)
        done.append("work")

    with files.background(work):
        done.append("block")
    assert done == ["block", "work"]

    def fails(stopped: object) -> None:
        raise OSError("of the thread")

    with pytest.raises(OSError, match="of the thread"), files.background(fails):
        done.append("block")


def test_background_work_hears_that_the_block_failed() -> None:
    heard = threading.Event()

    def work(stopped: object) -> None:
        assert callable(stopped)
        while not stopped():
            time.sleep(0.001)
        heard.set()
        raise OSError("of the thread")

    with pytest.raises(ValueError, match="of the block"), files.background(work):
        raise ValueError("of the block")
    assert heard.is_set()


@pytest.mark.parametrize("workers", [1, 3])
def test_tasks_in_parallel_stop_at_the_first_error(workers: int) -> None:
    done: list[int] = []

    def task(number: int) -> None:
        if number == 4:
            raise OSError("the fourth")
        time.sleep(0.005)
        done.append(number)

    files.in_parallel([partial(task, 1), partial(task, 2)], workers)
    assert sorted(done) == [1, 2]
    done.clear()
    with pytest.raises(OSError, match="the fourth"):
        files.in_parallel([partial(task, number) for number in (4, *range(100))], workers)
    assert len(done) < 50


def test_the_result_does_not_depend_on_how_many_work_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {number: make_checkpoint(tmp_path / f"model{number}", sharded=True) for number in (1, 2, 8)}
    patches = three(models[1])
    for number, model in models.items():
        monkeypatch.setattr(files, "processors", lambda number=number: number)
        apply(patches, model)
    assert contents(models[1]) == contents(models[2]) == contents(models[8])


def test_weights_with_equal_bytes_share_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "processors", lambda: 4)
    model = make_checkpoint(tmp_path / "model")
    tensors = weights(model)
    save_tensors(model, {**tensors, WEIGHTS[1]: tensors[WEIGHTS[0]].clone()}, sharded=True)
    (model / "model.safetensors").unlink()
    make_patch(tmp_path / "a.patch", model)
    before = snapshot(model)
    apply([tmp_path / "a.patch"], model)
    assert len(list((model / ".kpatch" / "base").iterdir())) == 2
    revert(model)
    assert snapshot(model) == before


def test_an_error_in_the_copying_thread_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_checkpoint(tmp_path / "model", sharded=True)
    a, _, _ = three(model)
    original = files.copy_range

    def copy_range(*args: object, **kwargs: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(5, "Input/output error")
        original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "copy_range", copy_range)
    monkeypatch.setattr(files, "processors", lambda: 1)
    assert "Input/output error" in refused(lambda: apply([a], model), KpatchError, "written", model).details[0]
