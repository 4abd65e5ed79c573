"""Ctrl-C that waits for the end of a short step that must not be cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def whole_steps() -> Iterator[Steps]:
    """While open, Ctrl-C inside `with steps.step():` takes effect at the step's end; elsewhere at once.

    Outside the main thread, which alone is interrupted, and where somebody ignores Ctrl-C, nothing changes.
    """
    steps = Steps()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield steps
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if steps.inside:
            steps.pending = True
        else:
            before(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield steps
    finally:
        signal.signal(signal.SIGINT, before)


class Steps:
    """Whether a step is being taken, and whether Ctrl-C came meanwhile."""

    def __init__(self) -> None:
        self.inside = False
        self.pending = False

    @contextmanager
    def step(self) -> Iterator[None]:
        self.inside = True
        try:
            yield
        finally:
            self.inside = False
            if self.pending:
                self.pending = False
                signal.raise_signal(signal.SIGINT)
