"""Writing to a checkpoint: one writer at a time, and staged files that change it by one decision or not at all.

No torch. `writing` holds the lock and turns what the disk refuses into errors; `commit`, `roll_forward` and `undo`
carry the decision out, or clean up where there was none.

The appearance of journal.json is the commit. Before it, nothing but .kpatch/ has changed and cleaning up gives the old
state; after it, every step can be repeated, so the next kpatch resumes where this one stopped.

One weight file is exchanged by one rename. While several are exchanged, the checkpoint is closed, so that nothing that
loads can see old ones beside new ones: first config.json gets another name, so that a loader which starts now stops at
once. Then every old file is moved aside, and only after a pause do the new ones take their names: a loader that had
read config.json before finds a file missing. Old and new never stand side by side, also not after a crash.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path

from kpatch import parallel
from kpatch.cache import holder, lock, write_error
from kpatch.checkpoint import files
from kpatch.checkpoint.records import Journal
from kpatch.checkpoint.store import Store
from kpatch.errors import Damaged, KpatchError, Refused
from kpatch.patch.container import ContainerError
from kpatch.reporter import SILENT, Reporter

if sys.platform != "win32":
    import fcntl

# Seconds between attempts at the lock: `status` takes it for an instant to see whether somebody has it.
_PATIENCE = (0.02, 0.05, 0.1)


@contextmanager
def writing(store: Store, *, tidy: bool = True) -> Iterator[None]:
    """Hold the checkpoint's lock; when `tidy`, the .kpatch folder goes with it if nothing else is left in it.

    Raises Refused when another kpatch holds it.
    """
    store.check()
    with system_errors(store.model):
        files.mkdir(store.root)
    with ExitStack() as stack:
        for wait in (*_PATIENCE, None):
            try:
                stack.enter_context(lock(store.lock, wait=False))
                break
            except Refused as error:
                if wait is None:
                    raise _busy(store, error) from None
                time.sleep(wait)
        try:
            yield
        finally:
            if tidy:
                with suppress(OSError):
                    store.remove_if_empty()


def _busy(store: Store, error: Refused) -> Refused:
    shown = str(store.model)
    return Refused(f"Another kpatch is working on {shown}", details=error.details, hint=error.hint)


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
        raise Damaged(f"{path} changed while it was being read", details=[str(error)]) from error


@contextmanager
def undisturbed(store: Store) -> Iterator[None]:
    """For work without the lock: a failure that another kpatch caused is reported as such (Refused)."""
    before = _record(store)
    try:
        yield
    except KpatchError as error:
        shown = str(store.model)
        if held(store.lock):
            raise Refused(f"Another kpatch is working on {shown}", hint="wait for it to end") from error
        if _record(store) != before:
            raise Refused(f"{shown} changed while it was being checked", hint="run the command again") from error
        raise


def _record(store: Store) -> bytes | None:
    try:
        return store.applied_file.read_bytes()
    except OSError:
        return None


def held(lock: Path) -> bool:
    """Whether another process holds the lock file; asks for it shared and for an instant."""
    if sys.platform == "win32" or lock.is_symlink() or not lock.is_file():
        return False
    try:
        with FileIO(lock, "rb") as handle:
            fcntl.flock(handle.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


CONFIG = "config.json"
SIGN = "config.json.kpatch-interrupted"
_OLD = ".kpatch-old"

# Seconds between the last old file's going and the first new one's coming. Whoever opens all weight files within that
# time cannot get some of each.
PAUSE = 0.1


def close(model: Path, names: Sequence[str]) -> None:
    """Close the checkpoint, move the old files aside, sync, remove them and wait; called again, do what is left of it.

    The new files must be synced by now: from here on there are no others.
    """
    if (model / CONFIG).exists() and not (model / SIGN).exists():
        files.replace(model / CONFIG, model / SIGN)
        files.fsync_dir(model)
    for name in names:
        if (model / name).exists():
            files.replace(model / name, model / (name + _OLD))
    files.fsync_dir(model)
    begin = time.monotonic()
    with suppress(OSError):  # tried again when the new ones have their names
        _remove_old(model, names)
    time.sleep(max(0.0, PAUSE - (time.monotonic() - begin)))


def _remove_old(model: Path, names: Sequence[str]) -> None:
    # Large files take a while to go: the wait is a good time for it.
    parallel.each(lambda name, advance: files.unlink(model / (name + _OLD)), names, files.nothing)


def reopen(model: Path, names: Sequence[str]) -> None:
    """Open the checkpoint again and remove what an interrupted run left aside. The new files must be in place."""
    _remove_old(model, names)
    # A config.json that somebody wrote meanwhile stays, and so does the earlier one beside it.
    if (model / SIGN).exists() and not (model / CONFIG).exists():
        files.replace(model / SIGN, model / CONFIG)
    files.fsync_dir(model)


def begin(store: Store) -> None:
    """Make the folders of an apply; `stage` comes first, for it is the sign that one is under way."""
    for folder in (store.stage, store.bases, store.copies):
        files.mkdir(folder)
    files.fsync_dir(store.root)
    files.fsync_dir(store.model)


def commit(store: Store, journal: Journal, report: Reporter = SILENT) -> None:
    """Decide and carry out. Everything staged must be synced by now.

    Raises Damaged when the system fails after the decision; the checkpoint is then interrupted.
    """
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
    except OSError as error:
        if store.journal_file.exists():
            raise _stopped(store, journal, error) from error
        raise


def _stopped(store: Store, journal: Journal, error: OSError) -> Damaged:
    shown = str(store.model)
    return Damaged(
        f"The {journal.action} was decided, but {shown} could not be changed in full",
        details=[error.strerror or str(error)],
        hint=f"`kpatch recover {shown}` completes it, once the disk can be written again",
    )


def roll_forward(store: Store, journal: Journal) -> None:
    """Carry out a commit, from wherever an earlier attempt stopped.

    Every step can be repeated, and is lasting before another builds on it. Raises Damaged when a staged file is not
    what was staged.
    """
    names = sorted(journal.files)
    left = [name for name in names if _is_staged(store, journal, name)]
    if left and len(names) > 1:
        close(store.model, left)
    for name in left:
        files.replace(store.staged(name), store.model / name)
    files.fsync_dir(store.model)
    if len(names) > 1:
        reopen(store.model, names)
    store.write_applied(journal.applied)
    store.keep_only(journal.applied)
    files.remove_tree(store.stage)
    files.fsync_dir(store.root)
    files.unlink(store.journal_file)
    files.fsync_dir(store.root)


def _is_staged(store: Store, journal: Journal, name: str) -> bool:
    """Whether a file still waits to take its place; if not, it must be there already."""
    staged, placed = store.staged(name), store.model / name
    waiting = os.path.lexists(staged)
    found = staged if waiting else placed
    if found.is_symlink() or not found.is_file() or found.stat().st_size != journal.files[name].size:
        what = "staged" if waiting else "new"
        raise Damaged(f"The {what} {name} is not what was staged", where=str(found))
    return waiting


def undo(store: Store) -> None:
    """Clean up after an apply or revert that ended before its commit; does nothing once there is a journal."""
    if store.journal_file.exists():
        return
    store.keep_only(store.applied())
    files.fsync_dir(store.root)
    files.remove_tree(store.stage)


def unfinished(store: Store) -> bool:
    """Whether an apply or revert began and did not end (it may still be running)."""
    return store.journal_file.exists() or store.stage.exists()


def abandoned(store: Store) -> bool:
    """Whether the maker of a folder died before or after all that matters: nothing is applied, or its note is left."""
    return store.root.exists() and (not store.applied_file.exists() or holder(store.lock).exists())
