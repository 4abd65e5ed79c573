"""Is a patched checkpoint as kpatch left it? Hashes of the changed weights. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kpatch.checkpoint import files, parallel
from kpatch.checkpoint.index import Checkpoint, TensorRef
from kpatch.checkpoint.store import Applied
from kpatch.errors import Damaged
from kpatch.patch.text import printable
from kpatch.reporter import SILENT, Reporter


@dataclass(frozen=True)
class Stamp:
    """What tells that a file was written to or replaced: size, time of change in ns, inode."""

    size: int
    mtime_ns: int
    inode: int


def stamp(path: Path) -> Stamp:
    """The stamp of the file a path leads to."""
    status = os.stat(path)
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino)


def hash_tensor(path: Path, ref: TensorRef, advance: files.Advance = files.nothing) -> str:
    """SHA-256 of a stored weight's bytes; `path` is the checkpoint's directory."""
    with files.open_read(path / ref.file) as handle:
        return files.hash_range(handle, ref.begin, ref.end, advance)


def changed_weights(
    checkpoint: Checkpoint, applied: Applied, report: Reporter = SILENT, only: Iterable[str] | None = None
) -> list[str]:
    """Names of patched weights that are no longer as kpatch left them, sorted."""
    names = sorted(applied.weights if only is None else only)
    amount = sum(_size(checkpoint.tensors.get(name)) for name in names)
    with report.task("Checking patched weights", amount, "B") as advance:
        intact = parallel.each(lambda name, go_on: _intact(checkpoint, name, applied, go_on), names, advance)
    return [name for name, sound in zip(names, intact, strict=True) if not sound]


def _size(ref: TensorRef | None) -> int:
    return 0 if ref is None else ref.end - ref.begin


def _intact(checkpoint: Checkpoint, name: str, applied: Applied, advance: files.Advance) -> bool:
    ref, weight = checkpoint.tensors.get(name), applied.weights[name]
    if ref is None or (ref.dtype, ref.shape) != (weight.dtype, weight.shape):
        return False
    return hash_tensor(checkpoint.path, ref, advance) == weight.after


def require_intact(checkpoint: Checkpoint, applied: Applied, report: Reporter = SILENT) -> None:
    """Raise Damaged when a patched weight was modified outside kpatch: reverting would lose that change."""
    changed = changed_weights(checkpoint, applied, report)
    if changed:
        raise Damaged(
            f"{checkpoint.given} was modified outside kpatch since a patch was applied",
            details=[f"not as kpatch left it: {printable(name, 120)}" for name in changed],
            hint="put back the weight files as they were; the bytes from before any patch are in .kpatch/base/",
        )
