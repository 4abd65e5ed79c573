"""From staged files to a changed checkpoint: one decision, written down first, then carried out to the end. No torch.

The appearance of journal.json is the commit. Before it, nothing but .kpatch/ has changed and cleaning up gives the old
state; after it, every step can be repeated, so the next kpatch carries on where this one stopped.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kpatch.cache import lock, write_error
from kpatch.checkpoint import files
from kpatch.checkpoint.store import Journal, Store
from kpatch.errors import Damaged, Refused
from kpatch.patch.container import ContainerError
from kpatch.patch.text import printable
from kpatch.reporter import SILENT, Reporter


@contextmanager
def writing(store: Store) -> Iterator[None]:
    """Hold the checkpoint's lock; the .kpatch folder goes with the lock when nothing else is left in it.

    Raises Refused when another kpatch holds it.
    """
    store.check()
    with system_errors(store.model):
        files.mkdir(store.root)
    try:
        with lock(store.lock, wait=False):
            try:
                yield
            finally:
                with suppress(OSError):
                    store.remove_if_empty()
    except Refused as error:
        if error.where != str(store.lock):
            raise
        raise Refused(
            f"Another kpatch is working on {printable(str(store.model))}", details=error.details, hint=error.hint
        ) from None


@contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """Turn errors of the system into errors a user can read: a full disk, a missing permission, a file cut off."""
    try:
        yield
    except OSError as error:
        named = Path(error.filename) if isinstance(error.filename, str) else path
        if error.errno == errno.EFBIG:
            error = OSError(error.errno, "The file would be larger than the system allows")
        raise write_error(error, named) from error
    except ContainerError as error:
        raise Damaged(
            f"{printable(str(path))} changed while it was being read", details=[printable(str(error))]
        ) from error


def begin(store: Store) -> None:
    """Make the folders of an apply; `stage` comes first, for it is the sign that one is under way."""
    for folder in (store.stage, store.bases, store.copies):
        files.mkdir(folder)
    files.fsync_dir(store.root)


def commit(store: Store, journal: Journal, report: Reporter = SILENT) -> None:
    """Decide and carry out. Everything staged must be synced by now."""
    files.fsync_dir(store.stage)
    files.fsync_dir(store.bases)
    files.fsync_dir(store.copies)
    try:
        store.write_journal(journal)
        roll_forward(store, journal)
    except KeyboardInterrupt:
        if store.journal_file.exists():
            roll_forward(store, journal)
            report.note(f"The {journal.action} was already decided when it was interrupted; it has been completed")
        raise


def roll_forward(store: Store, journal: Journal) -> None:
    """Carry out a commit, from wherever an earlier attempt stopped.

    Raises Damaged when a staged file is not what was staged.
    """
    for name, size in sorted(journal.files.items()):
        staged = store.staged(name)
        if not staged.exists():  # renamed by the attempt before
            continue
        if staged.is_symlink() or staged.stat().st_size != size:
            raise Damaged(f"The staged {printable(name)} is not what was staged", where=printable(str(staged)))
        files.replace(staged, store.model / name)
    files.fsync_dir(store.model)
    store.write_applied(journal.applied)
    store.keep_only(journal.applied)
    files.remove_tree(store.stage)
    files.unlink(store.journal_file)
    files.fsync_dir(store.root)


def undo(store: Store) -> None:
    """Clean up after an apply or revert that ended before its commit; does nothing once there is a journal."""
    if store.journal_file.exists():
        return
    store.keep_only(store.applied())
    files.remove_tree(store.stage)


def unfinished(store: Store) -> bool:
    """Whether an apply or revert began and did not end (it may still be running)."""
    return store.journal_file.exists() or store.stage.exists()


def abandoned(store: Store) -> bool:
    """Whether a folder is left in which nothing is applied: its maker died before or after all that matters."""
    return store.root.exists() and not store.applied_file.exists()
