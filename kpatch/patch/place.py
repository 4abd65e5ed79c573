"""Where a patch may be written. No torch, so that a bad place is told at once."""

from __future__ import annotations

from pathlib import Path

from kpatch.errors import BadInput, Refused
from kpatch.patch.text import printable


def check_place(path: str | Path, force: bool = False) -> Path:
    """The path, fit to be written to. Raises BadInput for a folder or where there is none, Refused for what exists."""
    path = Path(path)
    shown = printable(str(path))
    if path.is_dir():
        raise BadInput(f"{shown} is a folder; a patch is a file", hint="give a file name such as news.patch")
    if not path.parent.is_dir():
        raise BadInput(
            f"{shown} cannot be written: there is no folder {printable(str(path.parent))}",
            hint="make it, or give another name",
        )
    if not force and (path.is_symlink() or path.exists()):
        raise Refused(f"{shown} exists", hint="give another name with -o, or --force to write over it")
    return path
