"""`python -m kpatch`, and where the installed command `kpatch` starts."""

from __future__ import annotations

import os
import sys
from typing import TextIO


def run() -> None:
    """The whole program: settings of the process, then the command line, then its exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # kpatch shows its own
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a warning otherwise, after every fork
    for stream in (sys.stdout, sys.stderr):
        _never_fail(stream)
    try:
        from kpatch.cli.app import main

        code = main()
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _never_fail(stream: TextIO) -> None:
    """A terminal that cannot show a character gets its escape instead of an error."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    run()
