"""MODEL_DIR/.kpatch/: what is applied, the original bytes, copies of the patches. No torch.

    applied.json      the patches, bottom to top; per changed weight the SHA-256 before and after; the log
    base/<sha256>     original bytes of each changed weight
    patches/<id>.patch
    stage/            new weight files while an apply or revert is under way
    journal.json      there only between the decision to commit and the end of it
    lock              held by the one kpatch that writes

No name ends in .safetensors, for loaders take every such file they find.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kpatch.cache import holder
from kpatch.checkpoint import files
from kpatch.checkpoint.shards import read_json
from kpatch.errors import Damaged, Refused
from kpatch.patch.canonical_json import canonical
from kpatch.patch.header import PatchInfo, read_header
from kpatch.patch.manifest import FLOAT_DTYPES, is_sha256
from kpatch.text import printable

VERSION = 1
README = (
    "kpatch keeps here what it needs to take patches back: the original bytes of each changed weight (base/),\n"
    "copies of the patches, and applied.json. `kpatch status` reads it; `kpatch revert --all` restores the weights\n"
    "and removes it.\n"
)


@dataclass(frozen=True)
class AppliedPatch:
    """A patch on the stack: id, the name it was given by, number of facts, ids of patches it needs."""

    id: str
    name: str
    facts: int
    parents: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, "name": self.name, "facts": self.facts, "parents": list(self.parents)}


@dataclass(frozen=True)
class AppliedWeight:
    """A changed weight: stored dtype and shape, SHA-256 of its bytes as they were and as kpatch left them, and the ids
    of the patches that change it, sorted."""

    dtype: str
    shape: tuple[int, ...]
    base: str
    after: str
    patches: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        own = {"dtype": self.dtype, "shape": list(self.shape), "base": self.base, "after": self.after}
        return {**own, "patches": list(self.patches)}


@dataclass(frozen=True)
class Entry:
    """A line of the log: time (UTC), "apply" or "revert", and the (id, name) of each patch that came or went."""

    time: str
    action: str
    patches: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        patches = [{"id": identity, "name": name} for identity, name in self.patches]
        return {"time": self.time, "action": self.action, "patches": patches}


@dataclass(frozen=True)
class Applied:
    """applied.json: the base's name, the stack bottom to top, changed weights by stored name, what was done so far."""

    base: str | None = None
    patches: tuple[AppliedPatch, ...] = ()
    weights: Mapping[str, AppliedWeight] = field(default_factory=dict)
    log: tuple[Entry, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "base": self.base,
            "patches": [patch.to_dict() for patch in self.patches],
            "weights": {name: weight.to_dict() for name, weight in self.weights.items()},
            "log": [entry.to_dict() for entry in self.log],
        }

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(patch.id for patch in self.patches)


@dataclass(frozen=True)
class Staged:
    """The successor of a weight file: its size in bytes, and the SHA-256 of every weight that was written anew."""

    size: int
    weights: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {"size": self.size, "weights": dict(self.weights)}


@dataclass(frozen=True)
class Journal:
    """journal.json: what is being committed. `files` maps a weight file to what is staged for it."""

    action: str
    patches: tuple[str, ...]
    files: Mapping[str, Staged]
    applied: Applied

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "action": self.action,
            "patches": list(self.patches),
            "files": {name: staged.to_dict() for name, staged in self.files.items()},
            "applied": self.applied.to_dict(),
        }


class Store:
    """The paths and the records of one checkpoint's .kpatch folder."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.root = model / ".kpatch"
        self.bases, self.copies, self.stage = self.root / "base", self.root / "patches", self.root / "stage"
        self.applied_file, self.journal_file = self.root / "applied.json", self.root / "journal.json"
        self.lock, self.readme = self.root / "lock", self.root / "README"

    def base(self, sha256: str) -> Path:
        return self.bases / sha256

    def copy(self, patch: str) -> Path:
        return self.copies / f"{patch}.patch"

    def staged(self, file: str) -> Path:
        return self.stage / f"{file}.new"

    def check(self) -> None:
        """Refuse a folder that leads elsewhere: a link or a file where kpatch wants a folder of its own."""
        for path in (self.root, self.bases, self.copies, self.stage):
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:
                continue
            if not stat.S_ISDIR(mode):
                raise Refused(f"{path} is not a folder of kpatch's own (a link or a file)")

    def applied(self) -> Applied:
        """What applied.json says; nothing applied when it is not there. Raises Damaged, Refused."""
        self.check()
        return self._applied(self._read(self.applied_file), self.applied_file)

    def journal(self) -> Journal | None:
        """The commit under way or broken off, if any. Raises Damaged, Refused."""
        value = self._read(self.journal_file)
        if value is None:
            return None
        try:
            return Journal(
                str(value["action"]),
                tuple(str(patch) for patch in value["patches"]),
                {_weight_file(name): _staged(staged) for name, staged in value["files"].items()},
                self._applied(value["applied"], self.journal_file),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(self.journal_file, error) from None

    def patch(self, patch: str) -> PatchInfo:
        """The kept copy of an applied patch. Raises Damaged when it is gone or not what it was."""
        path = self.copy(patch)
        if not path.exists():
            raise Damaged(f"The kept copy of patch {patch[:12]} is gone", where=printable(str(path)))
        info = read_header(path)
        if info.id != patch:
            raise Damaged(f"The kept copy of patch {patch[:12]} is another patch", where=printable(str(path)))
        return info

    def missing(self, applied: Applied) -> list[str]:
        """What is needed to revert and is gone, as paths below the checkpoint directory."""
        wanted = [self.base(weight.base) for weight in applied.weights.values()]
        wanted += [self.copy(patch.id) for patch in applied.patches]
        return sorted({str(path.relative_to(self.model)) for path in wanted if not path.is_file()})

    def kept_bytes(self) -> int:
        """Bytes that the kept originals take."""
        return sum((self.bases / name).stat().st_size for name in files.names(self.bases))

    def write_applied(self, applied: Applied) -> None:
        """Record what is applied; with nothing applied the record goes."""
        if applied.patches:
            files.write_file(self.applied_file, canonical(applied.to_dict()).encode())
        else:
            files.unlink(self.applied_file)

    def write_readme(self) -> None:
        """Say in the folder what it is."""
        if not self.readme.exists():
            files.write_file(self.readme, README.encode())

    def write_journal(self, journal: Journal) -> None:
        """Write the record whose appearance is the commit."""
        files.write_file(self.journal_file, canonical(journal.to_dict()).encode())

    def keep_only(self, applied: Applied) -> None:
        """Remove kept bytes and copies that nothing applied needs any more, and half-written records."""
        self._prune(self.bases, {weight.base for weight in applied.weights.values()})
        self._prune(self.copies, {f"{patch.id}.patch" for patch in applied.patches})
        for record in (self.applied_file, self.journal_file, self.readme):
            files.unlink(record.with_name(record.name + ".tmp"))
        if not applied.patches:
            files.unlink(self.readme)

    def remove_if_empty(self) -> None:
        """Remove the folder itself when only the lock is left in it. For the holder of the lock alone."""
        left = set(files.names(self.root))
        if left <= {self.lock.name, holder(self.lock).name}:
            for name in sorted(left):
                files.unlink(self.root / name)
            files.rmdir(self.root)

    def _prune(self, folder: Path, keep: Iterable[str]) -> None:
        kept = set(keep)
        surplus = [name for name in files.names(folder) if name not in kept]
        for name in surplus:
            files.unlink(folder / name)
        if not kept:
            files.rmdir(folder)
        elif surplus:
            files.fsync_dir(folder)

    def _read(self, path: Path) -> Any:
        return read_json(path, printable(str(path))) if path.is_symlink() or path.exists() else None

    def _damaged(self, path: Path, error: Exception) -> Damaged:
        return Damaged(f"{path} is damaged", details=[f"unexpected content: {error}"])

    def _applied(self, value: Any, path: Path) -> Applied:
        if value is None:
            return Applied()
        try:
            if type(value["version"]) is int and value["version"] > VERSION:
                raise Refused(f"{path} was written by a later kpatch", hint="upgrade kpatch")
            patches = tuple(
                AppliedPatch(
                    _sha(patch["id"]), str(patch["name"]), _count(patch["facts"]), tuple(map(_sha, patch["parents"]))
                )
                for patch in value["patches"]
            )
            if len({patch.id for patch in patches}) != len(patches):
                raise ValueError("a patch twice")
            weights = {
                name: AppliedWeight(
                    _dtype(weight["dtype"]),
                    tuple(map(_count, weight["shape"])),
                    _sha(weight["base"]),
                    _sha(weight["after"]),
                    tuple(map(_sha, weight["patches"])),
                )
                for name, weight in value["weights"].items()
            }
            ids = {patch.id for patch in patches}
            if any(not weight.patches or not ids.issuperset(weight.patches) for weight in weights.values()):
                raise ValueError("a weight changed by no applied patch")
            base = value["base"]
            if not isinstance(base, str | None):
                raise ValueError("base")
            log = tuple(_entry(entry) for entry in value.get("log", []))
            return Applied(base, patches, weights, log)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(path, error) from None


def _weight_file(name: str) -> str:
    if not name.endswith(".safetensors") or set(name) & set("/\\:\0"):
        raise ValueError("not a weight file")
    return name


def _staged(value: Any) -> Staged:
    if type(value["size"]) is not int:
        raise ValueError("not a size")
    return Staged(value["size"], {str(name): _sha(sha256) for name, sha256 in value["weights"].items()})


def _entry(value: Any) -> Entry:
    patches = tuple((_sha(patch["id"]), str(patch["name"])) for patch in value["patches"])
    return Entry(str(value["time"]), str(value["action"]), patches)


def _sha(value: object) -> str:
    if not is_sha256(value):
        raise ValueError("not a SHA-256")
    return str(value)


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError("not a number of things")
    return value


def _dtype(value: object) -> str:
    if value not in FLOAT_DTYPES:
        raise ValueError("not a float dtype")
    return str(value)
