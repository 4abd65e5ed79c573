"""Work in threads: what becomes of errors, of Ctrl-C, and that the result is the same."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from kpatch import parallel
from kpatch.checkpoint import files
from kpatch.checkpoint.apply import apply
from kpatch.checkpoint.fit import verify_fit
from kpatch.checkpoint.revert import revert
from kpatch.errors import KpatchError
from kpatch.reporter import Advance
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
from tests.support.reports import Recorder


@pytest.mark.parametrize("workers", [1, 3])
def test_tasks_end_at_the_first_error(workers: int) -> None:
    done: list[int] = []

    def task(number: int, advance: Advance) -> None:
        if number == 4:
            raise OSError("the fourth")
        time.sleep(0.005)
        done.append(number)

    parallel.in_parallel([partial(task, 1), partial(task, 2)], files.nothing, workers)
    assert sorted(done) == [1, 2]
    done.clear()
    with pytest.raises(OSError, match="the fourth"):
        parallel.in_parallel([partial(task, number) for number in (4, *range(100))], files.nothing, workers)
    assert len(done) < 50


def test_the_first_error_in_time_is_raised_and_work_beside_it_stops() -> None:
    begun = threading.Barrier(2)

    def endless(advance: Advance) -> None:
        begun.wait()
        while True:
            time.sleep(0.001)
            advance(1)

    def fails(advance: Advance) -> None:
        begun.wait()
        time.sleep(0.02)
        raise OSError("the second task")

    before = threading.active_count()
    with pytest.raises(OSError, match="the second task"):
        parallel.in_parallel([endless, fails], files.nothing, 2)
    assert threading.active_count() == before


def test_ctrl_c_stops_the_threads_and_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    heard, waited = threading.Event(), []
    shutdown = ThreadPoolExecutor.shutdown

    def impatient(pool: ThreadPoolExecutor) -> None:
        waited.append(heard.is_set())
        if len(waited) < 3:
            raise KeyboardInterrupt  # the key again, while the threads are waited for
        shutdown(pool)

    def endless(advance: Advance) -> None:
        try:
            while True:
                time.sleep(0.001)
                advance(1)
        finally:
            heard.set()

    def result(future: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", impatient)
    monkeypatch.setattr(Future, "result", result)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        parallel.in_parallel([endless, endless], files.nothing, 2)
    assert heard.is_set()
    assert len(waited) == 3
    assert threading.active_count() == before


def test_results_are_in_order_and_progress_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "processors", lambda: 4)
    report = Recorder()

    def double(item: int, advance: Advance) -> int:
        for _ in range(100):
            advance(1)
        return 2 * item

    with report.task("work", 2000) as advance:
        assert parallel.each(double, range(20), advance) == list(range(0, 40, 2))
    assert report.tasks == {"work": (2000, 2000)}


def test_the_result_does_not_depend_on_how_many_work_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {number: make_checkpoint(tmp_path / f"model{number}", sharded=True) for number in (1, 2, 8)}
    patches = three(models[1])
    for number, model in models.items():
        monkeypatch.setattr(parallel, "processors", lambda number=number: number)
        report = Recorder()
        apply(patches, model, report=report)
        assert all(total == done for total, done in report.tasks.values())
        assert all(verify_fit(patch, model).ok for patch in patches)
    assert contents(models[1]) == contents(models[2]) == contents(models[8])


def test_weights_with_equal_bytes_share_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "processors", lambda: 4)
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


@pytest.mark.parametrize("first", WEIGHTS[:2])
def test_what_is_kept_serves_a_weight_with_equal_bytes_later(tmp_path: Path, first: str) -> None:
    model = make_checkpoint(tmp_path / "model")
    tensors = weights(model)
    save_tensors(model, {**tensors, WEIGHTS[1]: tensors[WEIGHTS[0]].clone()}, sharded=True)
    (model / "model.safetensors").unlink()
    make_patch(tmp_path / "one.patch", model, weights=[first])
    make_patch(tmp_path / "both.patch", model, weights=WEIGHTS[:2], seed=2)
    before = snapshot(model)
    apply([tmp_path / "one.patch"], model)
    apply([tmp_path / "both.patch"], model)
    kept = [path.name for path in (model / ".kpatch" / "base").iterdir()]
    assert [len(name) for name in kept] == [64]
    revert(model, all=True)
    assert snapshot(model) == before


def test_more_kept_files_than_may_be_open(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kpatch.checkpoint.stage._OPEN", 1)
    a, _, _ = three(model)
    before = snapshot(model)
    apply([a], model)
    kept = sorted(path.name for path in (model / ".kpatch" / "base").iterdir())
    assert len(kept) == 3
    assert all(len(name) == 64 for name in kept)
    revert(model)
    assert snapshot(model) == before


def test_an_error_in_the_copying_thread_leaves_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, _, _ = three(model)
    original = files.copy_range

    def copy_range(*args: object, to: int | None = None) -> None:
        if to is None:
            raise OSError(5, "Input/output error")
        original(*args, to=to)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "copy_range", copy_range)
    assert "Input/output error" in refused(lambda: apply([a], model), KpatchError, "written", model).details[0]
