"""A checkpoint's weights as they are without patches, and whether the patched ones are still as kpatch left them.

`status` stands on this module, so torch is imported only where a tensor is asked for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kpatch import parallel
from kpatch.checkpoint import files
from kpatch.checkpoint.records import Applied
from kpatch.checkpoint.shards import Checkpoint, TensorRef
from kpatch.checkpoint.store import Store
from kpatch.errors import Damaged
from kpatch.patch.container import ITEM_SIZE
from kpatch.reporter import SILENT, Reporter
from kpatch.text import printable

if TYPE_CHECKING:
    from torch import Tensor

# Entries of a tensor in memory at a time while it is brought into another dtype.
BLOCK = 1 << 21


class Weights(Protocol):
    """The unpatched weights of a checkpoint, by stored name."""

    @property
    def checkpoint(self) -> Checkpoint:
        """Where they are stored, and how."""

    def hash(self, name: str, advance: files.Advance = files.nothing) -> str:
        """SHA-256 of a weight's bytes as safetensors stores them. Raises Damaged when kept bytes are not sound."""

    def tensor(self, name: str) -> Tensor:
        """The weight in its stored dtype and shape; for those of a float dtype."""

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The weight's entries in order, a block at a time, each block one-dimensional."""

    def after(self, name: str) -> str | None:
        """SHA-256 of the weight as kpatch left it, where a patch is on it."""


@dataclass(frozen=True)
class StoredWeights:
    """The weights of safetensors files, or where a patch is applied the bytes kept of them."""

    checkpoint: Checkpoint
    store: Store
    applied: Applied

    def hash(self, name: str, advance: files.Advance = files.nothing) -> str:
        if name not in self.applied.weights:
            return hash_tensor(self.checkpoint.path, self.checkpoint.tensors[name], advance)
        sha256 = self.applied.weights[name].base
        read_base(self.store, sha256, advance)
        return sha256

    def tensor(self, name: str) -> Tensor:
        from kpatch.patch.fingerprint import tensor_from

        ref = self.checkpoint.tensors[name]
        return tensor_from(self._read(name, ref, 0, ref.end - ref.begin), ref.dtype, ref.shape)

    def blocks(self, name: str) -> Iterator[Tensor]:
        from kpatch.patch.fingerprint import tensor_from

        ref = self.checkpoint.tensors[name]
        step = BLOCK * ITEM_SIZE[ref.dtype]
        for begin in range(0, ref.end - ref.begin, step):
            yield tensor_from(self._read(name, ref, begin, min(step, ref.end - ref.begin - begin)), ref.dtype, (-1,))

    def file_hash(self, file: str, advance: files.Advance = files.nothing) -> str:
        """SHA-256 of a weight file as it is without patches. Raises Damaged when kept bytes are gone or cut short."""
        refs = self.checkpoint.tensors
        changed = sorted(
            (name for name in self.applied.weights if refs[name].file == file), key=lambda n: refs[n].begin
        )
        digest, at = hashlib.sha256(), 0
        with files.open_read(self.checkpoint.path / file) as handle:
            for name in changed:
                begin, end, sha256 = refs[name].begin, refs[name].end, self.applied.weights[name].base
                files.hash_into(digest, handle, at, begin, advance)
                require_base(self.store, sha256, end - begin)
                with files.open_read(self.store.base(sha256)) as kept:
                    files.hash_into(digest, kept, 0, end - begin, advance)
                at = end
            files.hash_into(digest, handle, at, os.fstat(handle.fileno()).st_size, advance)
        return digest.hexdigest()

    def after(self, name: str) -> str | None:
        return self.applied.weights[name].after if name in self.applied.weights else None

    def _read(self, name: str, ref: TensorRef, begin: int, length: int) -> bytearray:
        if name in self.applied.weights:
            with files.open_read(self.store.base(self.applied.weights[name].base)) as handle:
                return files.read_at(handle, begin, length)
        with files.open_read(self.checkpoint.path / ref.file) as handle:
            return files.read_at(handle, ref.begin + begin, length)


@dataclass(frozen=True)
class HashedOnce:
    """The same weights, each hashed only once however many patches ask for it."""

    weights: Weights
    found: dict[str, str] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Checkpoint:
        return self.weights.checkpoint

    def hash(self, name: str, advance: files.Advance = files.nothing) -> str:
        if name in self.found:
            advance(_size(self.checkpoint.tensors.get(name)))
        else:
            self.found[name] = self.weights.hash(name, advance)
        return self.found[name]

    def tensor(self, name: str) -> Tensor:
        return self.weights.tensor(name)

    def blocks(self, name: str) -> Iterator[Tensor]:
        return self.weights.blocks(name)

    def after(self, name: str) -> str | None:
        return self.weights.after(name)


def read_base(store: Store, sha256: str, advance: files.Advance = files.nothing) -> None:
    """Check kept original bytes against the hash they are named by. Raises Damaged."""
    try:
        with files.open_read(store.base(sha256)) as handle:
            size = store.base(sha256).stat().st_size
            sound = files.hash_range(handle, 0, size, advance) == sha256
    except OSError:
        sound = False
    if not sound:
        raise base_damaged(store, sha256)


def require_base(store: Store, sha256: str, size: int) -> None:
    """Check that kept original bytes are there, and as many as they should be. Raises Damaged."""
    try:
        sound = store.base(sha256).stat().st_size == size
    except OSError:
        sound = False
    if not sound:
        raise base_damaged(store, sha256)


def base_damaged(store: Store, sha256: str) -> Damaged:
    """The error for kept original bytes that are not what they were."""
    return Damaged(
        "The kept original bytes of a weight are gone or damaged",
        where=str(store.base(sha256)),
        hint="the checkpoint itself was not touched; get the original weights again to be able to revert",
    )


@dataclass(frozen=True)
class Stamp:
    """What tells that a file was written to or replaced: size, time of change in ns, inode."""

    size: int
    mtime_ns: int
    inode: int


def stamp(path: Path) -> Stamp:
    """The stamp of the file a path leads to."""
    status = os.stat(path)
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino)


def hash_tensor(path: Path, ref: TensorRef, advance: files.Advance = files.nothing) -> str:
    """SHA-256 of a stored weight's bytes; `path` is the checkpoint's directory."""
    with files.open_read(path / ref.file) as handle:
        return files.hash_range(handle, ref.begin, ref.end, advance)


def changed_weights(
    checkpoint: Checkpoint, applied: Applied, report: Reporter = SILENT, only: Iterable[str] | None = None
) -> list[str]:
    """Names of patched weights that are no longer as kpatch left them, sorted."""
    names = sorted(applied.weights if only is None else only)
    amount = sum(_size(checkpoint.tensors.get(name)) for name in names)
    with report.task("Checking patched weights", amount, "B") as advance:
        intact = parallel.each(lambda name, go_on: _intact(checkpoint, name, applied, go_on), names, advance)
    return [name for name, sound in zip(names, intact, strict=True) if not sound]


def _size(ref: TensorRef | None) -> int:
    return 0 if ref is None else ref.end - ref.begin


def _intact(checkpoint: Checkpoint, name: str, applied: Applied, advance: files.Advance) -> bool:
    ref, weight = checkpoint.tensors.get(name), applied.weights[name]
    if ref is None or (ref.dtype, ref.shape) != (weight.dtype, weight.shape):
        return False
    return hash_tensor(checkpoint.path, ref, advance) == weight.after


def require_intact(checkpoint: Checkpoint, applied: Applied, report: Reporter = SILENT) -> None:
    """Raise Damaged when a patched weight was modified outside kpatch: reverting would lose that change."""
    changed = changed_weights(checkpoint, applied, report)
    if changed:
        raise Damaged(
            f"{checkpoint.given} was modified outside kpatch since a patch was applied",
            details=[f"not as kpatch left it: {printable(name, 120)}" for name in changed],
            hint="put back the weight files as they were; the bytes from before any patch are in .kpatch/base/",
        )
