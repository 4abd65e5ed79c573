"""Which checkpoint a command without MODEL_DIR means."""

from __future__ import annotations

from pathlib import Path

from kpatch.cli.output import Output
from kpatch.errors import BadInput


def default_checkpoint(out: Output) -> Path:
    """The checkpoint in the current directory, else the one last applied to, which is named first.

    Raises BadInput where there is neither.
    """
    here = Path()
    if (here / ".kpatch").is_dir() or (here / "config.json").is_file():
        return here
    from kpatch.checkpoint.remember import last_applied

    last = last_applied()
    if last is None:
        raise BadInput("No checkpoint here, and none that was applied to before", hint="name the directory: MODEL_DIR")
    out.note(f"{last}: the checkpoint last applied to")
    return last
