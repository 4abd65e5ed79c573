"""Ending what an interrupted apply or revert began. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kpatch.checkpoint.commit import abandoned, roll_forward, system_errors, undo, unfinished, writing
from kpatch.checkpoint.index import real_directory
from kpatch.checkpoint.store import Store
from kpatch.patch.text import printable
from kpatch.reporter import SILENT, Reporter


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

    Raises Refused when another kpatch is at work there, Damaged when neither is possible.
    """
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
        roll_forward(store, journal)
        report.note(f"Completed an interrupted {printable(journal.action, 20)} of {given}")
        return Recovery(given, "completed", journal.action)
    was_unfinished = unfinished(store)
    undo(store)
    if not was_unfinished:
        return Recovery(given, "nothing")
    report.note(f"Cleaned up after an interrupted run; the weights of {given} had not been changed")
    return Recovery(given, "undone")
