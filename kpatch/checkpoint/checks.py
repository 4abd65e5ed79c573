"""What must hold before a weight is written, each with its refusal.

Parents, kept bytes, plain numbers, own files, space on the disk. No torch.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from kpatch import parallel
from kpatch.checkpoint import files
from kpatch.checkpoint.base_weights import read_base, require_base
from kpatch.checkpoint.records import AppliedPatch
from kpatch.checkpoint.shards import Checkpoint, TensorRef, read_json
from kpatch.checkpoint.store import Store
from kpatch.errors import KpatchError, Refused
from kpatch.patch.header import PatchInfo
from kpatch.quantized import quantized_by
from kpatch.reporter import Reporter
from kpatch.text import printable

_HUB_CACHE = re.compile(r"[/\\](models|datasets|spaces)--[^/\\]+[/\\]snapshots([/\\]|$)")


def require_parents(new: Sequence[PatchInfo], there_then: Sequence[PatchInfo], checkpoint: Checkpoint) -> None:
    """Raise Refused where a patch was made on top of one that is not among `there_then`."""
    there = {identity for info in there_then for identity in _held(info)}
    for info in new:
        missing = [parent for parent in info.manifest.parents if parent not in there]
        if missing:
            raise Refused(
                f"{info.path} was made on top of a patch that is not applied to {checkpoint.given}",
                details=[f"missing patch {parent[:12]}" for parent in missing],
                hint="apply that patch first, or in the same command",
            )


def require_no_child(moved: Sequence[AppliedPatch], stack: Sequence[AppliedPatch], store: Store) -> None:
    """Raise Refused where a patch to be taken off has one on top of it that stays."""
    for patch in moved:
        held = _held_by(patch, store)
        for child in stack:
            if held & set(child.parents):
                raise Refused(
                    f"{_named(patch)} cannot be reverted: {_named(child)} was made on top of it",
                    hint=f"revert {child.id[:12]} first, or both in one command",
                )


def _held(info: PatchInfo) -> set[str]:
    """A patch, and those that a stack adds up as they are; one at another scale is not what a patch was made on."""
    return {info.id, *(str(part["id"]) for part in info.manifest.stack if part["scale"] == 1)}


def _held_by(patch: AppliedPatch, store: Store) -> set[str]:
    try:
        return _held(store.patch(patch.id))
    except KpatchError:  # its copy is lost
        return {patch.id}


def _named(patch: AppliedPatch) -> str:
    return f"{printable(patch.name, 80)} ({patch.id[:12]})"


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise Refused for a quantized checkpoint, with the reason and the way."""
    config = checkpoint.path / "config.json"
    value = read_json(config, str(config)) if config.exists() else {}
    why = quantized_by(value, {name: ref.dtype for name, ref in checkpoint.tensors.items()})
    if why is not None:
        raise Refused(
            f"{checkpoint.given} is quantized ({why})",
            details=[
                "its weights are stored as codes and scales; adding a change to them would not give what was meant"
            ],
            hint="use the unquantized checkpoint, and quantize that again",
        )


def require_own_files(checkpoint: Checkpoint, names: Iterable[str], force: bool) -> None:
    """Only files of the directory's own are replaced: no link, no shared inode, nothing write-protected.

    Raises Refused.
    """
    aside = "leave it alone and write a patched copy: `kpatch apply … -o NEW_DIR`"
    for file in sorted(set(names)):
        status = os.lstat(checkpoint.path / file)
        shown = f"{file} of {checkpoint.given}"
        if stat.S_ISLNK(status.st_mode):
            raise Refused(f"{shown} is a symbolic link; other programs use the same file", hint=aside)
        if _HUB_CACHE.search(str(checkpoint.path)):
            raise Refused(f"{checkpoint.given} is the shared Hugging Face cache; other programs use it", hint=aside)
        if status.st_nlink > 1:
            raise Refused(
                f"{shown} has {status.st_nlink} hard links; other programs may use the same file", hint=aside
            )
        if not status.st_mode & 0o222 and not force:
            raise Refused(f"{shown} is write-protected", hint=f"`force` replaces it; or {aside}")


def require_kept(store: Store, kept: Iterable[tuple[str, TensorRef]], whole: bool, report: Reporter) -> None:
    """The kept bytes of weights, named by their SHA-256, must be there: hashed as a `whole`, else of the right size.

    Raises Damaged.
    """
    sizes = {sha256: ref.end - ref.begin for sha256, ref in kept}
    for sha256, size in sizes.items():
        require_base(store, sha256, size)
    if whole:
        with report.task("Checking kept bytes", sum(sizes.values()), "B") as advance:
            parallel.each(lambda base, go_on: read_base(store, base, go_on), sorted(sizes), advance)


def require_space(folder: Path, copied: int, cloned: int, sample: Path | None) -> None:
    """Raise KpatchError when the disk of `folder` has not the bytes that will be written, and a twentieth more.

    These are `cloned` where a copy can share its blocks with the file it is made of (tried out with `sample`), and
    `copied` elsewhere.
    """
    free = shutil.disk_usage(folder).free
    wanted = copied * 21 // 20
    if wanted > free and sample is not None and files.can_clone(sample, folder):
        wanted = cloned * 21 // 20
    if wanted > free:
        raise KpatchError(
            "Not enough space on the disk; nothing was changed",
            where=str(folder),
            details=[f"wanted {wanted:,} bytes   free {free:,}"],
        )
