"""How much memory a caller allows, and how much there is, in bytes."""

from __future__ import annotations

from pathlib import Path

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
