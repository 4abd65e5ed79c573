"""Faults: the N-th file operation of a command line fails, or is the last thing its process ever does.

What is wrapped are the functions of `kpatch.checkpoint.files`, through which every operation on a checkpoint's files
goes. A process that is to be killed is a real one, forked from this one so that nothing is imported anew; an operation
that only fails needs none of its own.
"""

from __future__ import annotations

import errno
import gc
import inspect
import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kpatch.checkpoint import commit, files
from kpatch.reporter import Advance
from tests.support import cli
from tests.support.checkpoints import make_checkpoint, make_patch

# What is built from other functions of the façade is counted through them.
_BUILT = {"write_file", "copy_file", "can_clone", "remove_tree", "hash_range", "_read", "_sync_file_range", "nothing"}
OPERATIONS = [
    name
    for name, value in vars(files).items()
    if inspect.isfunction(value) and value.__module__ == files.__name__ and name not in _BUILT
]
# A process killed before a read leaves the same disk as one killed before the next change.
READS = {"open_read", "read_at", "names"}
KILL = "KILL"

# How many faults this run of the tests has injected, by kind; told at the end.
injected: dict[str, int] = {}


@dataclass(frozen=True)
class Fault:
    """From operation `number` on (1 is the first): `kind` is KILL or the name of an errno; once, or `for_good`."""

    kind: str
    number: int
    for_good: bool = False


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code (negative: the signal), operations counted, the last of them, what it wrote."""

    code: int
    count: int
    last: str
    out: str
    err: str
    fired: bool


def one_by_one(tasks: Sequence[Callable[[Advance], None]], advance: Advance, workers: int) -> None:
    """In place of `parallel.in_parallel`: the same operations in the same order every time."""
    for task in tasks:
        task(advance)


def warm_up(folder: Path) -> None:
    """Import in this process what the commands import when they run, and build their parser."""
    model = make_checkpoint(folder / "model")
    make_patch(folder / "a.patch", model)
    for arguments in (["apply", folder / "a.patch", model], ["revert", model], ["recover", model], ["apply"]):
        cli.run(*arguments)


def run(arguments: Sequence[object], fault: Fault | None = None) -> Ended:
    """One command line with a fault in it; `fired` tells whether it got as far as the fault."""
    if fault is not None and fault.kind != KILL:
        ended = _failing([str(argument) for argument in arguments], fault)
    else:
        ended = finish(start(arguments, fault))
    if fault is not None and ended.fired:
        name = fault.kind if not fault.for_good else f"{fault.kind} from then on"
        injected[name] = injected.get(name, 0) + 1
    return ended


@dataclass(frozen=True)
class Child:
    """A child that runs, and the pipe on which it tells how it ended."""

    pid: int
    pipe: int


def start(
    arguments: Sequence[object], fault: Fault | None = None, before: Callable[[], object] = lambda: None
) -> Child:
    """Fork a child that runs a command line; `before` runs in it first."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside torch's idle threads
        pid = os.fork()
    if pid:
        os.close(write)
        return Child(pid, read)
    os.close(read)
    code = 99
    try:
        gc.disable()  # a collection would touch, and so copy, all the memory shared with the parent
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.fsync = lambda handle: None  # type: ignore[assignment]  # what is killed is a process, not the machine
        commit.PAUSE = 0.0
        before()
        code = _child(write, [str(argument) for argument in arguments], fault)
    except KeyboardInterrupt:  # after the run; what `kpatch.__main__` makes of it
        code = 130
    except BaseException as error:
        os.write(2, f"the child broke: {error!r}\n".encode())
    finally:
        os._exit(code)


def finish(child: Child) -> Ended:
    """Wait for a child and read what it told."""
    parts = []
    while part := os.read(child.pipe, 1 << 16):
        parts.append(part)
    os.close(child.pipe)
    _, status = os.waitpid(child.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if not parts:
        return Ended(code, 0, "", "", "", True)
    return Ended(**{**json.loads(b"".join(parts)), "code": code})


def _child(pipe: int, arguments: list[str], fault: Fault | None) -> int:
    ended = _failing(arguments, fault)
    os.write(pipe, json.dumps({**asdict(ended), "code": None}).encode())
    return ended.code


def _failing(arguments: list[str], fault: Fault | None) -> Ended:
    done = _Counted(fault)
    originals = {name: getattr(files, name) for name in OPERATIONS}
    for name, operation in originals.items():
        setattr(files, name, done.wrapped(name, operation))
    try:
        ran = cli.run(*arguments)
    finally:
        for name, operation in originals.items():
            setattr(files, name, operation)
    return Ended(ran.code, done.count, done.last, ran.out, ran.err, done.fired)


class _Counted:
    """Counts operations, and makes one of them go wrong."""

    def __init__(self, fault: Fault | None) -> None:
        self.fault, self.count, self.last, self.fired = fault, 0, "", False

    def wrapped(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            fault = self.fault
            if fault is not None and fault.kind == KILL and name in READS:
                return operation(*args, **kwargs)
            self.count, self.last = self.count + 1, name
            if fault is not None and (self.count == fault.number or (fault.for_good and self.count > fault.number)):
                self.fired = True
                if name == "write_at":  # half of it arrives
                    handle, offset, data = args
                    operation(handle, offset, memoryview(data)[: len(data) // 2])
                if fault.kind == KILL:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(getattr(errno, fault.kind), os.strerror(getattr(errno, fault.kind)))
            return operation(*args, **kwargs)

        return run


def lock_is_free(model: Path) -> bool:
    """Whether the lock of a checkpoint can be taken, if there is one."""
    import fcntl

    path = model / ".kpatch" / "lock"
    if not path.exists():
        return True
    with path.open("rb") as handle:
        try:
            fcntl.flock(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def milliseconds(arguments: Sequence[object]) -> float:
    """How long a command takes in a child."""
    begin = time.monotonic()
    run(arguments)
    return 1000 * (time.monotonic() - begin)
