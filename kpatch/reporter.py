"""How long-running work reports its progress without knowing whether a terminal shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Reporter(Protocol):
    """What the command line gives to the layers below it."""

    def task(self, description: str, total: int | None = None, unit: str = "") -> AbstractContextManager[Advance]:
        """A step with a known or unknown length; the value yielded is called with each amount done.

        `unit` is one of what is counted ("fact"), or B for bytes.
        """

    def note(self, message: str) -> None:
        """One line a user should read (a ridge was added, a cached result was used)."""

    def warn(self, message: str) -> None:
        """One line a user must read (an edit may be lost in rounding)."""


class Silent:
    """A reporter that says nothing: the default of the Python API."""

    @contextmanager
    def task(self, description: str, total: int | None = None, unit: str = "") -> Iterator[Advance]:
        yield lambda amount: None

    def note(self, message: str) -> None:
        return None

    def warn(self, message: str) -> None:
        return None


SILENT = Silent()
