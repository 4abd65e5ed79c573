"""What is applied to a checkpoint, and is it as kpatch left it. No torch, no lock."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kpatch.checkpoint.commit import held, unfinished
from kpatch.checkpoint.index import open_checkpoint, real_directory
from kpatch.checkpoint.integrity import changed_weights
from kpatch.checkpoint.store import Applied, Store
from kpatch.errors import KpatchError
from kpatch.patch.text import printable
from kpatch.reporter import SILENT, Reporter


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
    patches = tuple({"id": p.id, "name": printable(p.name, 80), "facts": p.facts} for p in applied.patches)
    base = None if applied.base is None else printable(applied.base, 200)
    return Status(given, state, base, patches, store.kept_bytes(), following, changed, busy)
