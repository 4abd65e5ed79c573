"""Ending what an interrupted apply or revert began. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kpatch.checkpoint import files
from kpatch.checkpoint.commit import abandoned, roll_forward, system_errors, undo, unfinished, writing
from kpatch.checkpoint.records import Journal
from kpatch.checkpoint.shards import MAX_HEADER, real_directory
from kpatch.checkpoint.store import Store
from kpatch.checkpoint.workplace import remove_leftovers
from kpatch.errors import Damaged
from kpatch.patch.container import ContainerError, read_container
from kpatch.reporter import SILENT, Reporter
from kpatch.text import printable


@dataclass(frozen=True)
class Recovery:
    """What was done: "nothing", "completed" (the new state) or "undone" (the old state), and the action it was."""

    model: str
    outcome: str
    action: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "outcome": self.outcome, "action": self.action}


def recover(model_dir: str | Path, report: Reporter = SILENT) -> Recovery:
    """Complete an interrupted apply or revert that had been decided, undo one that had not.

    For the directory that an interrupted `apply -o` was to write, remove what it left beside it.

    Raises Refused when another kpatch is at work there, Damaged when neither is possible.
    """
    target = Path(os.path.realpath(model_dir))
    with system_errors(target):
        removed = remove_leftovers(target)
    if removed and not target.exists():
        return Recovery(printable(str(model_dir)), "undone")
    path, given = real_directory(model_dir)
    store = Store(path)
    store.check()
    if not unfinished(store) and not abandoned(store):
        return Recovery(given, "nothing")
    with writing(store), system_errors(path):
        return settle(store, given, report)


def settle(store: Store, given: str, report: Reporter = SILENT) -> Recovery:
    """`recover` for a caller that holds the lock."""
    journal = store.journal()
    if journal is not None:
        _require_sound(store, journal)
        roll_forward(store, journal)
        report.note(f"Completed an interrupted {printable(journal.action, 20)} of {given}")
        return Recovery(given, "completed", journal.action)
    was_unfinished = unfinished(store)
    undo(store)
    if not was_unfinished:
        return Recovery(given, "nothing")
    report.note(f"Cleaned up after an interrupted run; the weights of {given} had not been changed")
    return Recovery(given, "undone")


def _require_sound(store: Store, journal: Journal) -> None:
    """Check every new file, staged or in place, before the first is moved: each weight must be what was decided on."""
    for name, expected in sorted(journal.files.items()):
        path = store.staged(name) if store.staged(name).exists() else store.model / name
        for weight, sha256 in sorted(expected.weights.items()):
            found = _hash_weight(path, weight)
            if found != sha256:
                raise Damaged(
                    f"{printable(weight, 120)} in {name} is neither the new one nor waiting to be replaced",
                    where=str(path),
                    details=[
                        f"expected sha256 {sha256[:8]}…   found {found[:8] + '…' if found else 'no such weight'}"
                    ],
                    hint="nothing was changed; the bytes from before any patch are in .kpatch/base/",
                )


def _hash_weight(path: Path, weight: str) -> str | None:
    try:
        with files.open_read(path) as handle:
            entry = read_container(handle, max_header=MAX_HEADER).entries.get(weight)
            return None if entry is None else files.hash_range(handle, entry.begin, entry.end)
    except (OSError, ContainerError):
        return None
