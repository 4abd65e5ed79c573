"""Work in several threads: hashing, copying and arithmetic let go of the interpreter's lock. No torch."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from kpatch.reporter import Advance

# Tasks done at a time, at the most: each holds some memory, and more are seldom faster.
MOST = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


class Stopped(Exception):
    """Work is no longer wanted: other work beside it failed, or the user pressed Ctrl-C."""


def processors() -> int:
    """How many processors this process may use."""
    if sys.platform == "win32":  # there threads that share a file share their place in it
        return 1
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def in_parallel(tasks: Sequence[Callable[[Advance], None]], advance: Advance, workers: int) -> None:
    """Do tasks, begun in their order, in `workers` threads; each is called with the `advance` to report to.

    The error that came first is raised, when every thread has ended. After an error or Ctrl-C no task is begun any
    more, and those at work end at their next call of `advance`, which raises Stopped.
    """
    if workers <= 1 or len(tasks) <= 1:
        for task in tasks:
            task(advance)
        return
    stop, lock, errors = threading.Event(), threading.Lock(), list[BaseException]()

    def go_on(amount: int) -> None:
        if stop.is_set():
            raise Stopped
        with lock:
            advance(amount)

    def run(task: Callable[[Advance], None]) -> None:
        try:
            if not stop.is_set():
                task(go_on)
        except BaseException as error:
            errors.append(error)
            stop.set()

    pool = ThreadPoolExecutor(min(workers, len(tasks)))
    try:
        for future in [pool.submit(run, task) for task in tasks]:
            future.result()
    finally:
        stop.set()
        _wait_for(pool)
    if errors:
        raise errors[0]


def _wait_for(pool: ThreadPoolExecutor) -> None:
    """Wait until its threads have ended, however often the user presses Ctrl-C: what follows may undo their work."""
    pressed: KeyboardInterrupt | None = None
    while True:
        try:
            pool.shutdown()
            break
        except KeyboardInterrupt as error:
            pressed = error
    if pressed is not None:
        raise pressed


def each(function: Callable[[Item, Advance], Result], items: Sequence[Item], advance: Advance) -> list[Result]:
    """`function` of every item and the `advance` to report to, as `in_parallel`; results in the order of the items."""
    results: dict[int, Result] = {}

    def put(number: int, advance: Advance) -> None:
        results[number] = function(items[number], advance)

    in_parallel([partial(put, number) for number in range(len(items))], advance, min(MOST, processors()))
    return [results[number] for number in range(len(items))]
