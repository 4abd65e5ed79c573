"""What `status` and `log` tell of a checkpoint: what is on it and whether it is intact, and what was done when.

No torch and no lock. The log lasts as long as a patch is on the checkpoint.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kpatch.checkpoint.base_weights import changed_weights
from kpatch.checkpoint.commit import held, unfinished
from kpatch.checkpoint.records import Applied, AppliedPatch, LogEntry
from kpatch.checkpoint.shards import open_checkpoint, real_directory
from kpatch.checkpoint.store import Store
from kpatch.errors import KpatchError
from kpatch.reporter import SILENT, Reporter
from kpatch.text import printable

# More than anybody reads; older entries go.
_KEPT = 1000


@dataclass(frozen=True)
class History:
    """The entries of a checkpoint's log, oldest first; the patches on it now are the last word, not their sum."""

    model: str
    entries: tuple[LogEntry, ...]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `log`."""
        return {"model": self.model, "entries": [_shown(entry).to_dict() for entry in self.entries]}


def history(model_dir: str | Path) -> History:
    """Read the log of a checkpoint directory. It is kept with what is applied, and goes with the last patch.

    Raises BadInput for what is no directory, Damaged when the record cannot be read.
    """
    path, given = real_directory(model_dir)
    return History(given, Store(path).applied().log)


def logged(before: Applied, action: str, moved: tuple[AppliedPatch, ...]) -> tuple[LogEntry, ...]:
    """The log with one more entry."""
    return (*before.log, LogEntry(now(), action, tuple((patch.id, patch.name) for patch in moved)))[-_KEPT:]


def now() -> str:
    """The time of an entry: UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _shown(entry: LogEntry) -> LogEntry:
    patches = tuple((identity, printable(name, 80)) for identity, name in entry.patches)
    return LogEntry(printable(entry.time, 40), printable(entry.action, 20), patches)


@dataclass(frozen=True)
class Status:
    """The state of a checkpoint directory.

    `state` is clean, modified (a patched weight is not as kpatch left it, or what revert needs is gone: `changed`) or
    interrupted (an apply or revert did not end). `next` is the command to run next, None when there is none that
    helps. `busy` when a kpatch is at work there now; the rest may then be out of date.
    """

    model: str
    state: str
    base: str | None
    patches: tuple[dict[str, Any], ...]
    kept_bytes: int
    next: str | None
    changed: tuple[str, ...] = ()
    busy: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of `status`."""
        return {
            "model": self.model,
            "state": self.state,
            "base": self.base,
            "patches": list(self.patches),
            "kept_bytes": self.kept_bytes,
            "next": self.next,
            "changed": list(self.changed),
            "busy": self.busy,
        }


def status(model_dir: str | Path, report: Reporter = SILENT) -> Status:
    """Read the state of a checkpoint directory; patched weights are hashed.

    Raises BadInput for what is no checkpoint directory, Damaged when it or its records cannot be read.
    """
    path, given = real_directory(model_dir)
    store = Store(path)
    applied = store.applied()
    quoted = shlex.quote(given)
    if held(store.lock):
        return _status(store, given, "clean", applied, None, busy=True)
    if unfinished(store):
        return _status(store, given, "interrupted", applied, f"kpatch recover {quoted}")
    try:
        odd = [*changed_weights(open_checkpoint(path), applied, report), *store.missing(applied)]
    except KpatchError:
        if held(store.lock) or unfinished(store):  # by an apply that began meanwhile
            return _status(store, given, "clean", applied, None, busy=True)
        raise
    changed = tuple(printable(name, 200) for name in odd)
    if changed:
        return _status(store, given, "modified", applied, None, changed)
    following = f"kpatch revert {quoted}" if applied.patches else f"kpatch apply PATCH {quoted}"
    return _status(store, given, "clean", applied, following)


def _status(
    store: Store,
    given: str,
    state: str,
    applied: Applied,
    following: str | None,
    changed: tuple[str, ...] = (),
    busy: bool = False,
) -> Status:
    gone = applied.gone
    patches = tuple(
        {
            **{"id": patch.id, "name": printable(patch.name, 80), "facts": patch.facts},
            **({"replaced": len(gone[patch.id])} if patch.id in gone else {}),
        }
        for patch in applied.patches
    )
    base = None if applied.base is None else printable(applied.base, 200)
    return Status(given, state, base, patches, store.kept_bytes(), following, changed, busy)
