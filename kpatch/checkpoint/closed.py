"""The closed sign: while several weight files are exchanged, nothing that loads may see old ones beside new ones.

First config.json gets another name, so that a loader which starts now stops at once. Then every old file goes aside,
and only after a pause do the new ones take their names: a loader that had read config.json before finds a file
missing. Old and new never stand side by side, also not after a crash. One file alone is exchanged by one rename, and
no sign is needed. No torch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from kpatch.checkpoint import files

CONFIG = "config.json"
SIGN = "config.json.kpatch-interrupted"
_OLD = ".kpatch-old"

# Seconds between the last old file's going and the first new one's coming. Whoever opens all weight files within that
# time cannot get some of each.
PAUSE = 0.1


def close(model: Path, names: Sequence[str]) -> None:
    """Hang the sign, move the old files aside, make that lasting, and wait; a second time does what is left."""
    if (model / CONFIG).exists() and not (model / SIGN).exists():
        files.replace(model / CONFIG, model / SIGN)
        files.fsync_dir(model)
    for name in names:
        if (model / name).exists():
            files.replace(model / name, model / (name + _OLD))
    files.fsync_dir(model)
    time.sleep(PAUSE)


def reopen(model: Path, names: Sequence[str]) -> None:
    """Take the sign down and remove what was moved aside. The new files must be lasting by now."""
    for name in names:
        files.unlink(model / (name + _OLD))
    # A config.json that somebody wrote meanwhile stays, and so does the earlier one beside it.
    if (model / SIGN).exists() and not (model / CONFIG).exists():
        files.replace(model / SIGN, model / CONFIG)
    files.fsync_dir(model)
