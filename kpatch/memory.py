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
    """Bytes of the machine's memory that programs can have without others being pushed out; None where unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None
