"""Where a result may be written: asked before the work starts, so that no hour of work ends in a refusal. No torch."""

from __future__ import annotations

import os
from pathlib import Path

from kpatch.errors import BadInput, Refused


def check_new_file(path: str | Path, *, force: bool = False, what: str = "the result") -> Path:
    """The path, fit to be written to.

    Raises BadInput for a directory or a missing parent directory, Refused for a file that exists without `force`.
    """
    path = Path(path)
    if _exists(path) and path.is_dir():
        raise BadInput(f"{path} is a directory; {what} is a file", hint="give a file name")
    _check_parent(path)
    if not force and _exists(path):
        raise Refused(f"{path} exists", hint="give another name with `out`, or `force` to write over it")
    return path


def check_new_directory(path: str | Path) -> Path:
    """The path, fit for a new directory; an empty one that exists may be filled.

    Raises BadInput for a missing parent directory, Refused for anything else that exists.
    """
    path = Path(path)
    if _exists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir())):
        raise Refused(f"{path} exists", hint="give a new directory")
    _check_parent(path)
    return path


def _exists(path: Path) -> bool:
    """Whether there is anything, a broken link too. Raises BadInput for what cannot be a path."""
    try:
        return os.path.lexists(path)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is no path that can be written", details=[str(error)]) from None


def _check_parent(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise BadInput(
            f"{path} cannot be written: there is no directory {path.parent}", hint="make it, or give another name"
        )
