"""Where kpatch keeps what is expensive to compute, and how it writes: whole files or none, one writer at a time."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kpatch.errors import KpatchError, Refused
from kpatch.reporter import SILENT, Reporter

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def cache_root() -> Path:
    """$KPATCH_CACHE, else the folder that Hugging Face reserves for other libraries' files.

    The same answer as huggingface_hub's constants, worked out here so that `kpatch status` need not import it.
    """
    own = os.environ.get("KPATCH_CACHE")
    if own:
        return Path(own).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    assets = os.environ.get("HF_ASSETS_CACHE") or os.environ.get("HUGGINGFACE_ASSETS_CACHE") or f"{home}/assets"
    return Path(os.path.expandvars(assets)).expanduser() / "kpatch"


def cache_dir(*parts: str) -> Path:
    """The folder `parts` below the cache's root, made if need be. Raises KpatchError where it cannot be made."""
    path = cache_root().joinpath(*parts)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(error, path) from error
    return path


def is_full(error: BaseException) -> bool:
    """True for a full disk or quota; safetensors wraps the system's error in text of its own."""
    return getattr(error, "errno", None) in _FULL or "No space left on device" in str(error)


def write_error(error: BaseException, path: Path) -> KpatchError:
    """The error for a file that could not be written."""
    hint = "set KPATCH_CACHE to a folder that can be written" if path.is_relative_to(cache_root()) else None
    if is_full(error):
        return KpatchError(
            "No space left on the disk",
            where=str(path),
            hint="free some space" + (", or set KPATCH_CACHE to a folder on another disk" if hint else ""),
        )
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return KpatchError("The file could not be written", where=str(path), details=[reason], hint=hint)


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Write `path` whole or not at all: `write` fills a file beside it, which is synced and renamed over it.

    Raises KpatchError for a full disk or a folder that cannot be written; other errors of `write` pass through.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise write_error(error, path) from error
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp and safetensors make files that only their owner can read
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) or is_full(error):
            raise write_error(error, path) from error
        raise


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all. Raises as `atomic_write` does."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    atomic_write(path, write)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A folder that appears as `path` whole or not at all: the block fills the one it gets, which is renamed then.

    `path` may be an empty folder. Raises KpatchError for a full disk or a place that cannot be written; other errors
    of the block pass through.
    """
    path = path.absolute()
    temporary: Path | None = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        yield temporary
        for file in temporary.iterdir():
            file.chmod(0o666 & ~_umask())
            sync(file)
        temporary.chmod(0o777 & ~_umask())
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) or is_full(error):
            raise write_error(error, path) from error
        raise


def sync(path: Path) -> None:
    """Push a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def lock(path: Path, *, wait: bool = True, report: Reporter = SILENT) -> Iterator[None]:
    """Hold the lock file `path`; the holder's process and machine stand in a note beside it.

    Raises Refused where somebody else holds it and `wait` is False.
    """
    from filelock import FileLock, Timeout

    note = holder(path)
    held = FileLock(path)
    try:
        held.acquire(timeout=0)
    except Timeout:
        who = _read_holder(note)
        if not wait:
            raise Refused(
                "Another kpatch is running here",
                where=str(path),
                details=[f"held by {who}"],
                hint="wait for it to end",
            ) from None
        report.note(f"Waiting for {who}, which is writing {path.parent.name}/{path.stem}")
        held.acquire()
    except OSError as error:
        raise write_error(error, path) from error
    try:
        with suppress(OSError):
            note.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            note.unlink()
        held.release()


def holder(path: Path) -> Path:
    """Where the holder of the lock file `path` says who it is; a killed one leaves it behind."""
    return path.with_name(path.name + ".holder")


def _read_holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")[:200] or "another process"
    except OSError:
        return "another process"


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
