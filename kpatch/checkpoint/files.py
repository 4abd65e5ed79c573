"""Every operation on files that apply and revert make, one small function each.

Nothing else in `checkpoint` calls the operating system to change or sync a file, so a test that wraps these functions
can fail or kill any step. No torch.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from io import FileIO
from pathlib import Path
from typing import cast

from kpatch.patch.container import CutOff, open_regular

if sys.platform != "win32":
    import fcntl

CHUNK = 1 << 23
# Bytes hashed at a time: few enough to stay in a processor's cache between the reading and the hashing.
_HASHED = 1 << 18
# ioctl number of Linux (linux/fs.h): share the source's blocks with the target.
_FICLONE = 0x40049409
# SYNC_FILE_RANGE_WRITE of Linux (linux/fs.h): begin to write, wait for nothing.
_WRITE = 2

Advance = Callable[[int], None]


def nothing(amount: int) -> None:
    """The progress callback of work nobody watches."""


def open_read(path: Path) -> FileIO:
    """Open a regular file for reading. Raises ContainerError for a pipe or device, OSError."""
    return open_regular(path)


def create(path: Path, mode: int = 0o666) -> FileIO:
    """Create a new file for writing and reading back, never through a link; the umask applies to `mode`."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_BINARY"):
        flags |= getattr(os, name, 0)
    return FileIO(os.open(path, flags, mode), "rb+")


def read_at(handle: FileIO, offset: int, length: int) -> bytearray:
    """`length` bytes from `offset`, whoever else uses the handle. Raises CutOff when the file ends before."""
    data = bytearray(length)
    _read(handle, offset, memoryview(data))
    return data


def read_into(handle: FileIO, offset: int, buffer: bytearray, length: int) -> memoryview:
    """The same into the first `length` bytes of a buffer that is used again; gives those."""
    view = memoryview(buffer)[:length]
    _read(handle, offset, view)
    return view


def _read(handle: FileIO, offset: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        if sys.platform == "win32":
            handle.seek(offset + done)
            count = handle.readinto(view[done:])
        else:
            count = os.preadv(handle.fileno(), [view[done:]], offset + done)
        if not count:
            raise CutOff(f"it ends at byte {offset + done:,}; {offset + len(view):,} were expected")
        done += count


def write_at(handle: FileIO, offset: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of `data` at `offset`, whoever else uses the handle."""
    view, done = memoryview(data), 0
    while done < len(view):
        if sys.platform == "win32":
            handle.seek(offset + done)
            done += handle.write(view[done:]) or 0
        else:
            done += os.pwrite(handle.fileno(), view[done:], offset + done)


def reserve(handle: FileIO, length: int) -> None:
    """Claim disk space now, so that a full disk shows before anything else is done; where the system can."""
    if length and sys.platform == "linux":
        try:
            os.posix_fallocate(handle.fileno(), 0, length)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def clone(source: FileIO, target: FileIO) -> bool:
    """Make `target` a copy that shares its blocks with `source`; False where the filesystem cannot."""
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        return False
    return True


def can_clone(source: Path, folder: Path) -> bool:
    """Whether a copy of `source` in `folder` could share its blocks; tried out on a file that goes again."""
    probe = folder / "probe.tmp"
    unlink(probe)
    try:
        with open_read(source) as old, create(probe, 0o600) as new:
            return clone(old, new)
    finally:
        unlink(probe)


def copy_range(
    source: FileIO, target: FileIO, begin: int, end: int, advance: Advance = nothing, to: int | None = None
) -> None:
    """Copy bytes [begin, end) to the same place of `target`, or to `to`; inside the kernel where the system can."""
    shift = 0 if to is None else to - begin
    in_kernel = sys.platform == "linux"
    while begin < end:
        length = min(CHUNK, end - begin)
        count = 0
        if sys.platform == "linux" and in_kernel:
            try:
                count = os.copy_file_range(source.fileno(), target.fileno(), length, begin, begin + shift)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM):
                    raise
                in_kernel = False
        if not count:  # the kernel cannot, or says end of file: reading settles which
            write_at(target, begin + shift, read_at(source, begin, length))
            count = length
        begin += count
        advance(count)


def hash_range(handle: FileIO, begin: int, end: int, advance: Advance = nothing) -> str:
    """SHA-256 of bytes [begin, end) as 64 hex digits."""
    digest = hashlib.sha256()
    hash_into(digest, handle, begin, end, advance)
    return digest.hexdigest()


def hash_into(digest: hashlib._Hash, handle: FileIO, begin: int, end: int, advance: Advance = nothing) -> None:
    """Add bytes [begin, end) to a hash."""
    buffer = bytearray(min(_HASHED, max(0, end - begin)))
    while begin < end:
        length = min(len(buffer), end - begin)
        digest.update(read_into(handle, begin, buffer, length))
        begin += length
        advance(length)


def keep_attributes(handle: FileIO, old: os.stat_result, *, owner: bool = True) -> None:
    """Give a new file the mode of the one it will replace, and its owner and group unless `owner` is false.

    Raises OSError when it may not.
    """
    if sys.platform == "win32":
        return
    new = os.fstat(handle.fileno())
    if owner and (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        os.fchown(handle.fileno(), old.st_uid, old.st_gid)
    os.fchmod(handle.fileno(), stat.S_IMODE(old.st_mode))  # after the owner: a change of owner clears bits


def begin_sync(handle: FileIO, begin: int, end: int) -> None:
    """Let the system begin to bring bytes [begin, end) to the disk, where it can, and do not wait for it.

    No promise: only that an fsync which follows has less left to do.
    """
    call = _sync_file_range()
    if call is not None and end > begin:
        call(handle.fileno(), begin, end - begin, _WRITE)


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """The call of Linux, which Python has no name for; None elsewhere."""
    if sys.platform != "linux":
        return None
    import ctypes

    try:
        call = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return cast("Callable[[int, int, int, int], int]", call)


def fsync(handle: FileIO) -> None:
    """Push a file's bytes to the disk itself."""
    if sys.platform == "darwin":  # fsync alone stops at the drive's cache there
        with suppress(OSError):
            fcntl.fcntl(handle.fileno(), fcntl.F_FULLFSYNC)
            return
    os.fsync(handle.fileno())


def fsync_dir(path: Path) -> None:
    """Push a folder's list of names to the disk."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(source: Path, target: Path) -> None:
    """Rename over `target` in one step."""
    os.replace(source, target)


def rename_dir(source: Path, target: Path) -> None:
    """Give a folder its final name in one step. Raises OSError when a folder with something in it is there."""
    os.rename(source, target)


def unlink(path: Path) -> None:
    """Remove a file; one that is gone is no error."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def mkdir(path: Path) -> None:
    """Make one folder; one that is there is no error."""
    with suppress(FileExistsError):
        os.mkdir(path)


def rmdir(path: Path) -> None:
    """Remove an empty folder; one that is gone is no error."""
    with suppress(FileNotFoundError):
        os.rmdir(path)


def names(path: Path) -> list[str]:
    """The names in a folder, sorted; none when there is no such folder."""
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []


def remove_tree(path: Path) -> None:
    """Remove a folder of ours and what is in it; links are removed, not followed."""
    for name in names(path):
        child = path / name
        if child.is_dir() and not child.is_symlink():
            remove_tree(child)
        else:
            unlink(child)
    rmdir(path)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all: a file beside it, synced, renamed over it, the folder synced."""
    temporary = path.with_name(path.name + ".tmp")
    unlink(temporary)
    with create(temporary) as handle:
        write_at(handle, 0, data)
        fsync(handle)
    replace(temporary, path)
    fsync_dir(path.parent)


def copy_file(source: Path, target: Path, advance: Advance = nothing, *, keep_mode: bool = True) -> None:
    """Copy a file to a new name and sync it, with its mode or with the one the umask gives."""
    with open_read(source) as old, create(target) as new:
        status = os.fstat(old.fileno())
        if clone(old, new):
            advance(status.st_size)
        else:
            copy_range(old, new, 0, status.st_size, advance)
        if keep_mode:
            keep_attributes(new, status, owner=False)
        fsync(new)


def set_mode(path: Path, mode: int) -> None:
    """Set a folder's permissions."""
    os.chmod(path, stat.S_IMODE(mode))
