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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from kpatch.cache import holder
from kpatch.checkpoint import files
from kpatch.checkpoint.records import Applied, Journal, NewerRecord
from kpatch.checkpoint.shards import read_json
from kpatch.errors import Damaged, Refused
from kpatch.patch.canonical_json import canonical
from kpatch.patch.header import PatchInfo, read_header

Record = TypeVar("Record")
README = (
    "kpatch keeps here what it needs to take patches back: the original bytes of each changed weight (base/),\n"
    "copies of the patches, and applied.json. `kpatch status` reads it; `kpatch revert --all` restores the weights\n"
    "and removes it.\n"
)


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
        value = self._read(self.applied_file)
        return Applied() if value is None else self._parsed(Applied.from_dict, value, self.applied_file)

    def journal(self) -> Journal | None:
        """The commit under way or broken off, if any. Raises Damaged, Refused."""
        value = self._read(self.journal_file)
        if value is None:
            return None
        return self._parsed(Journal.from_dict, value, self.journal_file)

    def patch(self, patch: str) -> PatchInfo:
        """The kept copy of an applied patch. Raises Damaged when it is gone or not what it was."""
        path = self.copy(patch)
        if not path.exists():
            raise Damaged(f"The kept copy of patch {patch[:12]} is gone", where=str(path))
        info = read_header(path)
        if info.id != patch:
            raise Damaged(f"The kept copy of patch {patch[:12]} is another patch", where=str(path))
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
        return read_json(path, str(path)) if path.is_symlink() or path.exists() else None

    def _parsed(self, parse: Callable[[Any], Record], value: Any, path: Path) -> Record:
        try:
            return parse(value)
        except NewerRecord:
            raise Refused(f"{path} was written by a later kpatch", hint="upgrade kpatch") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Damaged(f"{path} is damaged", details=[f"unexpected content: {error}"]) from None
