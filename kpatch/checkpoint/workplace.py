"""The folder in which a patched copy is built, beside the place the copy will have; held by a lock. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kpatch.cache import holder
from kpatch.checkpoint import files
from kpatch.checkpoint.commit import writing
from kpatch.checkpoint.store import Store
from kpatch.errors import Refused


def partial(target: Path) -> Path:
    """Where a copy is built that will be `target`: one fixed name, so that leftovers of a killed run are found."""
    return target.with_name(f".{target.name[:200]}.kpatch-partial")


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """An empty folder to build `target` in. It goes when the block fails; the block may rename it.

    What a killed run left there is removed first. Raises Refused when another kpatch builds there, or when the folder
    is none of kpatch's.
    """
    folder = partial(target)
    _require_ours(folder)
    store = Store(folder)
    try:
        files.mkdir(folder)
        with writing(store, tidy=False):
            try:
                _clear(store)
                yield folder
            except BaseException:
                with suppress(OSError):
                    _clear(store)
                    store.remove_if_empty()
                raise
    except BaseException:
        with suppress(OSError):  # goes only when it is empty: another kpatch may be building there
            files.rmdir(folder)
        raise


def _clear(store: Store) -> None:
    """Remove all but .kpatch with its lock, which this process holds and which says whose the folder is."""
    files.set_mode(store.model, 0o700)
    inside = [store.root / name for name in files.names(store.root) if not name.startswith(store.lock.name)]
    for path in [*(store.model / name for name in files.names(store.model)), *inside]:
        if path == store.root:
            continue
        if path.is_dir() and not path.is_symlink():
            files.remove_tree(path)
        else:
            files.unlink(path)
    files.fsync_dir(store.model)  # .kpatch is lasting before anything else is: it tells that the folder may go


def name_it(folder: Path, target: Path) -> None:
    """Let the copy appear: one rename of the whole folder."""
    store = Store(folder)
    files.unlink(holder(store.lock))
    files.fsync_dir(store.root)
    files.rename_dir(folder, target)
    files.fsync_dir(target.parent)


def remove_leftovers(target: Path) -> bool:
    """Remove what a killed `apply -o` left beside `target`. Raises Refused while one is still building."""
    folder = partial(target)
    if not folder.is_dir():
        return False
    _require_ours(folder)
    store = Store(folder)
    with writing(store, tidy=False):
        _clear(store)
        store.remove_if_empty()
    files.rmdir(folder)
    files.fsync_dir(target.parent)
    return True


def _require_ours(folder: Path) -> None:
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir() or (files.names(folder) and not Store(folder).root.is_dir()):
        raise Refused(f"{folder} is in the way", hint="kpatch did not make it; move it elsewhere")
