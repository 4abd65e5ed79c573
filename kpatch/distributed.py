"""One job in several processes, as `torchrun` starts them: who does what, and how results and errors come together.

Every rank runs the same program. `share` deals tasks out and `main_does` leaves something to rank 0; both give every
rank the same result. Until `join`, and inside what one rank does by itself, they simply call what they are given.

torchrun ends all ranks when one of them dies or its machine is lost. What it does not do is done here: an error on any
rank is left in the store that all ranks see, a rank at work is interrupted there as by Ctrl-C, so that what it had
finished is kept, and all ranks end with the error that came first, which one of them reports.
"""

from __future__ import annotations

import _thread
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from typing import Any, TypeVar

from kpatch.errors import BadInput, KpatchError

_CHECK_EVERY = 1.0  # seconds between looks for an error of another rank
_REPORT_WITHIN = 30.0  # seconds for which the others leave it to rank 0 to report an error
_LEAVE_WITHIN = 10.0  # seconds for which rank 0, whose process may hold the store, waits for the others to leave
_TIMEOUT = timedelta(minutes=10)  # for meeting at the start, and for handing results over once all have them
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass
class _Group:
    rank: int
    world: int
    store: Any  # a torch.distributed store
    streams: tuple[Any, Any]  # stdout and stderr as they were
    meetings: int = 0
    alone: int = 0  # > 0 inside what one rank does by itself
    interrupted: KpatchError | None = None  # why this rank's work was interrupted
    settled: bool = False  # all ranks are done, or know of an error
    ended: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raise the error that ended the job on another rank, if one did."""
        if self.interrupted is not None:
            raise self.interrupted
        try:
            if not self.store.check(["error"]):
                return
            error = pickle.loads(self.store.get("error"))
        except RuntimeError as lost:
            raise _lost(lost) from lost
        raise error

    def meet(self) -> None:
        """Wait until every rank has come as far as this one. Raises what `check` does."""
        self.meetings += 1
        place, pause = f"meeting {self.meetings}", 0.001
        try:
            self.store.add(place, 1)
            while int(self.store.add(place, 0)) < self.world:
                self.check()
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
        except RuntimeError as error:
            raise _lost(error) from error

    @contextmanager
    def by_itself(self) -> Iterator[None]:
        self.alone += 1
        try:
            yield
        finally:
            self.alone -= 1

    def watch(self) -> None:
        """In a thread: interrupt this rank's work where another rank has failed."""
        while not self.ended.wait(_CHECK_EVERY):
            try:
                self.check()
            except Exception as error:
                self.interrupted = error if isinstance(error, KpatchError) else _lost(error)
                if not self.ended.is_set():
                    _thread.interrupt_main()
                return

    def first_error(self, error: KpatchError) -> KpatchError:
        """`error`, or the one that another rank has left before it. Raises RuntimeError without the store."""
        self.settled = True
        if int(self.store.add("errors", 1)) == 1:
            self.store.set("error", pickle.dumps(error))
            return error
        found: KpatchError = pickle.loads(self.store.get("error"))
        return found

    def reports(self) -> bool:
        """Whether this rank reports the error: rank 0, or the first other one where rank 0 does not come."""
        end = time.monotonic() + (_REPORT_WITHIN if self.rank else 0.0)
        try:
            while time.monotonic() < end:
                if self.store.check(["reported"]):
                    return False
                time.sleep(0.05)
            return int(self.store.add("reporters", 1)) == 1
        except RuntimeError:
            return True


_group: _Group | None = None
_joined = 0  # how many jobs this process has joined: each has its own names in the store


def launched() -> bool:
    """True in one of several processes that torchrun, or something like it, has started."""
    return all(name in os.environ for name in _VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


def rank() -> int:
    """This process's number, from 0; 0 where it is the only one."""
    return int(os.environ["RANK"]) if launched() else 0


def local_rank() -> int | None:
    """This process's number on its machine, None where it is the only one."""
    return int(os.environ["LOCAL_RANK"]) if launched() else None


def _active() -> _Group | None:
    return _group if _group is not None and not _group.alone else None


def is_main() -> bool:
    """True for the rank that does what is done once, and inside what a rank does by itself."""
    group = _active()
    return group is None or group.rank == 0


def mine(index: int) -> bool:
    """Whether `share` gives task number `index` to this rank."""
    group = _active()
    return group is None or index % group.world == group.rank


def ranks() -> int:
    """How many processes `share` gives tasks to."""
    group = _active()
    return 1 if group is None else group.world


def share(tasks: Sequence[Task], work: Callable[[Task], Result]) -> list[Result]:
    """work(task) of every task, in their order, on every rank: task i is done by rank i modulo their number.

    Tasks must be the same on every rank, and results must pickle, with tensors on the CPU.
    """
    group = _active()
    if group is None or not tasks:
        return [work(task) for task in tasks]
    done = []
    with group.by_itself():
        for task in tasks[group.rank :: group.world]:
            group.check()
            done.append(work(task))
    group.meet()
    import torch.distributed as dist

    found: list[Any] = [None] * group.world
    dist.all_gather_object(found, done)
    return [found[index % group.world][index // group.world] for index in range(len(tasks))]


def main_does(work: Callable[[], Result]) -> Result:
    """work() of rank 0 on every rank. It starts when all have come here, and its result must pickle."""
    group = _active()
    if group is None:
        return work()
    group.meet()
    found: list[Any] = [None]
    if group.rank == 0:
        with group.by_itself():
            found = [work()]
    group.meet()
    import torch.distributed as dist

    sent = list(found)
    dist.broadcast_object_list(sent, src=0)
    result: Result = (found if group.rank == 0 else sent)[0]
    return result


def same(what: str, work: Callable[[], Result]) -> Result:
    """work() of every rank, rank 0 first. Raises BadInput where a rank's result differs from rank 0's."""
    found = main_does(work)
    group = _active()
    if group is not None and group.rank:
        with group.by_itself():
            own = work()
        if own != found:
            raise BadInput(
                f"Rank {group.rank} has other {what} than rank 0",
                details=[f"expected {found}", f"found {own}"],
                hint="give every machine the same files",
            )
    return found


# The beginning and the end


def join() -> None:
    """Meet the other ranks; from here on only rank 0 prints. Raises KpatchError where they do not come."""
    global _group, _joined
    dist: Any = import_module("torch.distributed")
    try:
        store, number, world = next(dist.rendezvous("env://", timeout=_TIMEOUT))
        _joined += 1
        store = dist.PrefixStore(f"kpatch {_joined}", store)
        dist.init_process_group("gloo", store=store, rank=number, world_size=world, timeout=_TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        raise KpatchError(
            "The ranks could not meet", details=[_first_line(error)], hint="start all of them with torchrun"
        ) from error
    _group = _Group(number, world, dist.PrefixStore("job", store), (sys.stdout, sys.stderr))
    if number:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
        if os.environ.get("KPATCH_DEBUG") != "1":
            sys.stderr = sys.stdout
    threading.Thread(target=_group.watch, daemon=True).start()


def finish() -> None:
    """Wait until every rank is done, so that none succeeds where another fails. Raises its error."""
    if _group is not None:
        _group.meet()
        _group.settled = True


def leave() -> None:
    """The last thing a rank does."""
    global _group
    group, _group = _group, None
    if group is None:
        return
    group.ended.set()
    with suppress(RuntimeError):
        if not group.settled:
            group.first_error(KpatchError(f"Rank {group.rank} ended before its work was done"))
        left = int(group.store.add("left", int(group.rank > 0)))
        end = time.monotonic() + _LEAVE_WITHIN
        while group.rank == 0 and left < group.world - 1 and time.monotonic() < end:
            time.sleep(0.02)
            left = int(group.store.add("left", 0))
    with suppress(RuntimeError):
        import_module("torch.distributed").destroy_process_group()
    sys.stdout, sys.stderr = group.streams


@contextmanager
def failing(error: KpatchError) -> Iterator[tuple[KpatchError, bool]]:
    """The error that ends all ranks, this one or one that came before it, and whether this rank reports it."""
    group = _group
    if group is None:
        yield error, True
        return
    group.ended.set()
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end has begun; another interruption would break it off
    first = group.interrupted or error
    with suppress(RuntimeError):  # no rank is left to agree with
        first = group.first_error(first)
    mine = group.reports()
    if mine:
        sys.stdout, sys.stderr = group.streams
    yield first, mine
    if mine:
        with suppress(RuntimeError):
            group.store.set("reported", "")


def _lost(error: BaseException) -> KpatchError:
    return KpatchError(
        "The other ranks can no longer be reached",
        details=[_first_line(error)],
        hint="run the same command again: what was finished is kept",
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
