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
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None
    try:
        most = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        return free if most == "max" else max(0, min(free, int(most) - used))
    except (OSError, ValueError):
        return free
