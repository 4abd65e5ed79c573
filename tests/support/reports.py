"""A reporter that remembers what it was told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kpatch.reporter import Advance


class Recorder:
    """Notes, warnings, and for each task its description, total and the sum of what was done."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.tasks: dict[str, tuple[int | None, int]] = {}

    @contextmanager
    def task(self, description: str, total: int | None = None, unit: str = "") -> Iterator[Advance]:
        self.tasks[description] = (total, 0)

        def advance(amount: int) -> None:
            self.tasks[description] = (total, self.tasks[description][1] + amount)

        yield advance

    def note(self, message: str) -> None:
        self.notes.append(message)

    def warn(self, message: str) -> None:
        self.warnings.append(message)
