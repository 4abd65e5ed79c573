"""Is there room on the disk? Asked before anything large is written. No torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from kpatch.checkpoint import files
from kpatch.errors import KpatchError
from kpatch.patch.text import printable


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
            where=printable(str(folder)),
            details=[f"wanted {wanted:,} bytes   free {free:,}"],
        )
