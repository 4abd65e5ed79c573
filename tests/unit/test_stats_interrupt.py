"""Steps that Ctrl-C does not break off in the middle."""

from __future__ import annotations

import signal
import threading
from contextlib import nullcontext

import pytest

from kpatch.stats.covariance import whole_steps


def test_ctrl_c_outside_a_step_is_immediate_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    reached = []

    def interrupted(inside: bool) -> None:
        with whole_steps() as steps, steps.step() if inside else nullcontext():
            signal.raise_signal(signal.SIGINT)
            reached.append(inside)

    for inside in (False, True):
        with pytest.raises(KeyboardInterrupt):
            interrupted(inside)
        assert signal.getsignal(signal.SIGINT) is before
    assert reached == [True]


def test_steps_work_beside_the_main_thread() -> None:
    done = []

    def work() -> None:
        with whole_steps() as steps, steps.step():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
