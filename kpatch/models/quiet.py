"""transformers' and accelerate's own bars and warnings kept off the terminal, for the length of one call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """While open, transformers shows no progress bar and logs errors only; afterwards its settings are as before."""
    from transformers.utils import logging

    accelerate = getLogger("accelerate")
    before = accelerate.level
    accelerate.setLevel(ERROR)
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        accelerate.setLevel(before)
        if bars:
            logging.enable_progress_bar()
