"""The closed sign: while several weight files are exchanged, nothing that loads may see old ones beside new ones.

First config.json gets another name, so that a loader which starts now stops at once. Then every old file goes aside,
and only after a pause do the new ones take their names: a loader that had read config.json before finds a file
missing. Old and new never stand side by side, also not after a crash. One file alone is exchanged by one rename, and
no sign is needed. No torch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from kpatch.checkpoint import files, parallel

CONFIG = "config.json"
SIGN = "config.json.kpatch-interrupted"
_OLD = ".kpatch-old"

# Seconds between the last old file's going and the first new one's coming. Whoever opens all weight files within that
# time cannot get some of each.
PAUSE = 0.1


def close(model: Path, names: Sequence[str]) -> None:
    """Hang the sign, move the old files aside, make that lasting, remove them, and wait; again: do what is left of it.

    The new files must be lasting by now: from here on there is nothing else.
    """
    if (model / CONFIG).exists() and not (model / SIGN).exists():
        files.replace(model / CONFIG, model / SIGN)
        files.fsync_dir(model)
    for name in names:
        if (model / name).exists():
            files.replace(model / name, model / (name + _OLD))
    files.fsync_dir(model)
    begin = time.monotonic()
    with suppress(OSError):  # tried again when the new ones have their names
        _remove_old(model, names)
    time.sleep(max(0.0, PAUSE - (time.monotonic() - begin)))


def _remove_old(model: Path, names: Sequence[str]) -> None:
    # Large files take a while to go: the wait is a good time for it.
    parallel.each(lambda name, advance: files.unlink(model / (name + _OLD)), names, files.nothing)


def reopen(model: Path, names: Sequence[str]) -> None:
    """Take the sign down, and remove what a run that broke off had left aside. The new files must have their names."""
    _remove_old(model, names)
    # A config.json that somebody wrote meanwhile stays, and so does the earlier one beside it.
    if (model / SIGN).exists() and not (model / CONFIG).exists():
        files.replace(model / SIGN, model / CONFIG)
    files.fsync_dir(model)
