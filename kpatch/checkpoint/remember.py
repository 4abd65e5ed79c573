"""Which checkpoint was last applied to: what `kpatch revert` means when none is named. No torch."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from kpatch.cache import atomic_write, cache_dir, cache_root
from kpatch.errors import KpatchError

_NAME = "last-applied.json"


def remember(model: Path) -> None:
    """Note the checkpoint last applied to. A cache that cannot be written is no reason to fail."""
    text = json.dumps({"model": str(model)}, ensure_ascii=True)
    with suppress(KpatchError, OSError):
        atomic_write(cache_dir() / _NAME, lambda temporary: _write(temporary, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def last_applied() -> Path | None:
    """The checkpoint last applied to, if it is known and still there."""
    try:
        value = json.loads((cache_root() / _NAME).read_text(encoding="utf-8"))
        path = Path(value["model"])
        return path if path.is_dir() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget(model: Path) -> None:
    """Drop the note when it names this checkpoint."""
    if last_applied() == model:
        with suppress(OSError):
            (cache_root() / _NAME).unlink()
