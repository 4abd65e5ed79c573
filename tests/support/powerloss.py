"""A disk that forgets what was not synced: all that may be left of a folder when the power goes during a run.

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

# Every path of a folder with its mode and bytes; None for a folder's.
Tree = frozenset[tuple[str, int, "bytes | None"]]


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
    """What is lasting of a folder, kept up to date while operations on it run; `left` is all that losses may leave,
    with the place where each was seen first, `losses` how many there were."""

    def __init__(self, root: Path, turns: int = len(KEPT)) -> None:
        self.root = root
        self.left: dict[Tree, str] = {}
        self.losses = 0
        self._turns = turns
        self._lasting = _load(root)
        self._seen = _copied(self._lasting)
        self._twins: dict[int, _Folder] = {}  # of folders as they are seen, by id: the lasting ones
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
    def watching(self) -> Iterator[None]:
        """Note what a loss would leave, before each operation that changes anything."""
        originals = {name: getattr(files, name) for name in OPERATIONS if name not in READS}
        try:
            for name, operation in originals.items():
                setattr(files, name, self._watched(name, operation))
            yield
        finally:
            for name, operation in originals.items():
                setattr(files, name, operation)

    def _watched(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        note = getattr(self, f"_{name}", None)

        def run(*args: Any, **kwargs: Any) -> Any:
            for tree, kept in self.now().items():
                self.left.setdefault(tree, f"loss {self.losses}, before {name}, {kept}")
            there = name in ("unlink", "rmdir", "mkdir") and os.path.lexists(args[0])
            result = operation(*args, **kwargs)
            if note is None or (name in ("unlink", "rmdir", "mkdir") and there == os.path.lexists(args[0])):
                return result  # nothing was done
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
                for place, name, new in change:
                    _put(self._twins[id(place)], name, self._twins[id(new)] if isinstance(new, _Folder) else new)
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

    def _at(self, path: Path) -> _File | _Folder:
        found: _File | _Folder = self._seen
        for part in path.relative_to(self.root).parts:
            assert isinstance(found, _Folder)
            found = found.entries[part]
        return found

    def now(self) -> dict[Tree, str]:
        """What a loss at this moment may leave: of the changes that were not synced none, the last only, all but the
        first, or some by chance."""
        found: dict[Tree, str] = {}
        for turn in range(self._turns):
            luck, kept = random.Random(f"{self.losses} {turn}"), KEPT[min(turn, len(KEPT) - 1)]
            chosen = {
                "none": [],
                "last": self._pending[-1:],
                "all but the first": self._pending[1:],
                "some": [change for change in self._pending if luck.random() < 0.5],
            }[kept]
            found.setdefault(self._tree(chosen, luck if kept != "none" else None), f"kept {kept}")
        self.losses += self._turns
        return found

    def _tree(self, chosen: list[_Change], luck: random.Random | None) -> Tree:
        copies: dict[int, _Folder] = {}
        left = _copied(self._lasting, copies)

        def copy(folder: _Folder) -> _Folder:  # of one that is not lasting itself, too
            lasting = self._twins[id(folder)]
            return copies[id(lasting)] if id(lasting) in copies else _copied(lasting, copies)

        for change in chosen:
            for folder, name, new in change:
                _put(copy(folder), name, copy(new) if isinstance(new, _Folder) else new)
        return frozenset(_walk(left, "", luck))


def write(tree: Tree, target: Path) -> None:
    """Make `target` a folder with that in it."""
    target.mkdir()
    for name, mode, data in sorted(tree, key=lambda item: item[0]):
        if data is None:
            (target / name).mkdir(exist_ok=True)
        else:
            (target / name).write_bytes(data)
            (target / name).chmod(mode)
    for name, mode, data in tree:
        if data is None:
            (target / name).chmod(mode)


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


def _copied(folder: _Folder, copies: dict[int, _Folder] | None = None) -> _Folder:
    """The same files in folders of its own; `copies` gets the copy of each folder by the id of its original."""
    entries = {n: _copied(e, copies) if isinstance(e, _Folder) else e for n, e in folder.entries.items()}
    copy = _Folder(folder.mode, entries)
    if copies is not None:
        copies[id(folder)] = copy
    return copy


def _walk(folder: _Folder, path: str, luck: random.Random | None) -> Iterator[tuple[str, int, bytes | None]]:
    yield path or ".", folder.mode, None
    for name, entry in folder.entries.items():
        below = f"{path}/{name}" if path else name
        if isinstance(entry, _Folder):
            yield from _walk(entry, below, luck)
            continue
        data, mode = entry.lasting
        if luck is not None:
            seen = entry.seen()
            if (data, mode) != seen:
                data = luck.choice([data, seen[0][: len(seen[0]) // 2], seen[0]])
        yield below, mode, data
