"""What was done to a checkpoint and when, as long as a patch is on it. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kpatch.checkpoint.index import real_directory
from kpatch.checkpoint.store import Applied, AppliedPatch, Entry, Store
from kpatch.patch.text import printable

# More than anybody reads; older entries go.
_KEPT = 1000


@dataclass(frozen=True)
class History:
    """The entries of a checkpoint's log, oldest first; the patches on it now are the last word, not their sum."""

    model: str
    entries: tuple[Entry, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `log`."""
        return {"model": self.model, "entries": [_shown(entry).to_dict() for entry in self.entries]}


def history(model_dir: str | Path) -> History:
    """Read the log of a checkpoint directory. It is kept with what is applied, and goes with the last patch.

    Raises BadInput for what is no directory, Damaged when the record cannot be read.
    """
    path, given = real_directory(model_dir)
    return History(given, Store(path).applied().log)


def logged(before: Applied, action: str, moved: tuple[AppliedPatch, ...]) -> tuple[Entry, ...]:
    """The log with one more entry."""
    return (*before.log, Entry(now(), action, tuple((patch.id, patch.name) for patch in moved)))[-_KEPT:]


def now() -> str:
    """The time of an entry: UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _shown(entry: Entry) -> Entry:
    patches = tuple((identity, printable(name, 80)) for identity, name in entry.patches)
    return Entry(printable(entry.time, 40), printable(entry.action, 20), patches)
