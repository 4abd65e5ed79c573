"""What the Python API takes where a patch is expected: the path of a file, or what was read from one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

from kpatch.errors import BadInput


@runtime_checkable
class ReadPatch(Protocol):
    """A `Patch` or a `PatchInfo`: it knows its id, and the file that it was read from."""

    @property
    def id(self) -> str: ...

    @property
    def path(self) -> Path | None: ...


PatchSource: TypeAlias = str | os.PathLike[str] | ReadPatch


def patch_path(patch: PatchSource) -> Path:
    """The file of a patch. Raises BadInput for a patch that was never in a file, and for anything else."""
    if isinstance(patch, str | os.PathLike):
        return Path(patch)
    if not isinstance(patch, ReadPatch):
        raise _no_patch(patch)
    if patch.path is None:
        raise BadInput(
            f"Patch {patch.id[:12]} is in memory only",
            hint="write it to a file with kpatch.patch.format.write_patch, and give that file",
        )
    return patch.path


def patch_list(patches: PatchSource | Iterable[PatchSource]) -> list[PatchSource]:
    """One patch as a list of one, several as a list. Raises BadInput for what is neither."""
    if isinstance(patches, str | os.PathLike | ReadPatch):
        return [patches]
    if isinstance(patches, Iterable):
        return list(patches)
    raise _no_patch(patches)


def _no_patch(value: object) -> BadInput:
    return BadInput(
        f"Expected a patch, found a value of type {type(value).__name__}",
        hint="give the path of a .patch file, or what `kpatch.read_patch` gives",
    )
