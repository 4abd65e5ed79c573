"""How much memory a caller allows, and how much there is, in bytes; and giving back what is not needed any more."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from kpatch.errors import BadInput


def bytes_given(given: object, default: int, name: str) -> int:
    """The bytes that a caller gave as `name`, or the default for None. Raises BadInput for no number of 1 or more."""
    if given is None:
        return default
    if not isinstance(given, int | float) or isinstance(given, bool) or not 1 <= given < float("inf"):
        raise BadInput(
            f"`{name}={given}` is no number of bytes", details=["expected 1 or more, as in 2_000_000_000 for 2 GB"]
        )
    return int(given)


def free_memory() -> int | None:
    """Bytes that programs can still have, by Linux and within the limit of the container; None on other systems."""
    free, limit = _of_the_machine("MemAvailable:"), _of_the_container("memory.max")
    used = _of_the_container("memory.current")
    return free if free is None or limit is None or used is None else max(0, min(free, limit - used))


def all_memory() -> int | None:
    """Bytes of memory that there are, free or not, within the limit of the container; None on other systems."""
    there, limit = _of_the_machine("MemTotal:"), _of_the_container("memory.max")
    return there if there is None or limit is None else min(there, limit)


def give_back() -> None:
    """Let the system have what this process has freed, where the C library can (glibc); elsewhere nothing happens.

    It keeps freed blocks of less than 32 MB for what comes next, and a small one that stays above them pins them all.
    After batches of tensors of ever other sizes most of a process is such holes.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], Any] | None:
    try:
        found: Callable[[int], Any] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no such handle on Windows
        return None
    return found if sys.platform.startswith("linux") else None


def _of_the_machine(name: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    except (OSError, ValueError, StopIteration):
        return None


def _of_the_container(name: str) -> int | None:
    try:
        return int((Path("/sys/fs/cgroup") / name).read_text(encoding="ascii"))
    except (OSError, ValueError):  # no container, or "max"
        return None
