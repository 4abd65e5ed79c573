"""A disk that forgets what was not synced: what is left of a folder when the power goes at the N-th operation.

Names and contents are lasting apart from each other. A file's bytes last from its fsync; an entry of a folder (a new
name, a rename, a removal) from the fsync of that folder. At a loss every other change may be there or not, each for
itself; of bytes that were not synced nothing is there, or half, or all.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kpatch.checkpoint import files
from tests.support.faults import OPERATIONS, READS

KEPT = ("none", "last", "all but the first", "some")


class PowerLoss(BaseException):
    """The machine is off: this operation and all later ones do not happen."""


@dataclass
class _File:
    """`lasting` is what was synced, `seen` what was written, each with the mode."""

    lasting: tuple[bytes, int] = (b"", 0o600)
    path: Path | None = None

    def seen(self) -> tuple[bytes, int]:
        if self.path is None or not self.path.is_file():
            return self.lasting
        return self.path.read_bytes(), stat.S_IMODE(self.path.stat().st_mode)


@dataclass
class _Folder:
    mode: int = 0o755
    entries: dict[str, _File | _Folder] = field(default_factory=dict)


_Change = list[tuple[_Folder, str, "_File | _Folder | None"]]


class Disk:
    """What is lasting of a folder, kept up to date while operations on it run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.count = 0
        self._lasting = _load(root)
        self._seen = _copied(self._lasting)
        self._twins: dict[int, _Folder] = {}
        self._pair(self._seen, self._lasting)
        self._pending: list[_Change] = []
        self._open: dict[int, _File] = {}

    def _pair(self, seen: _Folder, lasting: _Folder) -> None:
        self._twins[id(seen)] = lasting
        for name, entry in seen.entries.items():
            if isinstance(entry, _Folder):
                twin = lasting.entries[name]
                assert isinstance(twin, _Folder)
                self._pair(entry, twin)

    @contextmanager
    def losing(self, number: int) -> Iterator[Disk]:
        """The power goes before the `number`-th operation that changes anything."""
        originals = {name: getattr(files, name) for name in OPERATIONS if name not in READS}
        try:
            for name, operation in originals.items():
                setattr(files, name, self._watched(name, operation, number))
            yield self
        finally:
            for name, operation in originals.items():
                setattr(files, name, operation)

    def _watched(self, name: str, operation: Callable[..., Any], number: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count >= number:
                raise PowerLoss
            note = getattr(self, f"_{name}", None)
            if name in ("unlink", "rmdir", "mkdir"):  # no change where there is nothing to do
                there = os.path.lexists(args[0])
                result = operation(*args, **kwargs)
                if there != os.path.lexists(args[0]) and note is not None:
                    note(*args)
                return result
            result = operation(*args, **kwargs)
            if note is not None:
                note(*args, result) if name == "create" else note(*args)
            return result

        return run

    # What each operation means for the names; contents are looked at when they are synced.

    def _create(self, path: Path, *rest: Any) -> None:
        new = _File(path=path)
        self._open[rest[-1].fileno()] = new
        self._change((path, new))

    def _unlink(self, path: Path) -> None:
        self._change((path, None))

    _rmdir = _unlink

    def _mkdir(self, path: Path) -> None:
        new = _Folder()
        self._twins[id(new)] = _Folder()
        self._change((path, new))

    def _replace(self, source: Path, target: Path) -> None:
        moved = self._at(source)
        if isinstance(moved, _File):
            moved.path = target
        self._change((source, None), (target, moved))

    _rename_dir = _replace

    def _fsync(self, handle: Any) -> None:
        file = self._open[handle.fileno()]
        file.lasting = file.seen()

    def _fsync_dir(self, path: Path) -> None:
        folder = self._at(path)
        assert isinstance(folder, _Folder)
        self._twins[id(folder)].mode = stat.S_IMODE(path.stat().st_mode)
        left = []
        for change in self._pending:
            if any(place is folder for place, _, _ in change):
                self._settle(change)
            else:
                left.append(change)
        self._pending = left

    def _change(self, *steps: tuple[Path, _File | _Folder | None]) -> None:
        change: _Change = []
        for path, new in steps:
            folder = self._at(path.parent)
            assert isinstance(folder, _Folder), path
            change.append((folder, path.name, new))
            _put(folder, path.name, new)
        self._pending.append(change)

    def _settle(self, change: _Change) -> None:
        for folder, name, new in change:
            _put(self._twins[id(folder)], name, self._twins[id(new)] if isinstance(new, _Folder) else new)

    def _at(self, path: Path) -> _File | _Folder:
        found: _File | _Folder = self._seen
        for part in path.relative_to(self.root).parts:
            assert isinstance(found, _Folder)
            found = found.entries[part]
        return found

    def write_what_is_left(self, target: Path, kept: str, luck: random.Random) -> None:
        """Make `target` what the folder is after the loss. Of the changes that were not synced `kept` are there:
        "none", the "last" one only, "all but the first", or "some"."""
        chosen = {
            "none": [],
            "last": self._pending[-1:],
            "all but the first": self._pending[1:],
            "some": [change for change in self._pending if luck.random() < 0.5],
        }[kept]
        for change in chosen:
            self._settle(change)
        _store(self._lasting, target, luck if chosen else None)


def _put(folder: _Folder, name: str, new: _File | _Folder | None) -> None:
    if new is None:
        folder.entries.pop(name, None)
    else:
        folder.entries[name] = new


def _load(path: Path) -> _Folder:
    found = _Folder(stat.S_IMODE(path.stat().st_mode))
    for child in path.iterdir():
        if child.is_dir():
            found.entries[child.name] = _load(child)
        else:
            found.entries[child.name] = _File((child.read_bytes(), stat.S_IMODE(child.stat().st_mode)))
    return found


def _copied(folder: _Folder) -> _Folder:
    """The same files in folders of its own."""
    entries = {n: _copied(e) if isinstance(e, _Folder) else e for n, e in folder.entries.items()}
    return _Folder(folder.mode, entries)


def _store(folder: _Folder, path: Path, luck: random.Random | None) -> None:
    path.mkdir()
    for name, entry in folder.entries.items():
        if isinstance(entry, _Folder):
            _store(entry, path / name, luck)
            continue
        data, mode = entry.lasting
        seen = entry.seen()
        if luck is not None and (data, mode) != seen:
            data = luck.choice([data, seen[0][: len(seen[0]) // 2], seen[0]])
        (path / name).write_bytes(data)
        (path / name).chmod(mode)
    path.chmod(folder.mode)
