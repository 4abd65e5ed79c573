"""Well-known subjects of many kinds, and statements in which each stands: what an edit of other facts must not move.

The list is subjects.yaml. Reading it needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True, slots=True)
class Subject:
    """A subject that most models have met: its name, and what kind of thing it is."""

    name: str
    kind: str


@cache
def subjects() -> tuple[Subject, ...]:
    """All of them, in the file's order: more than two thousand, no name twice."""
    return tuple(Subject(name, kind) for kind, entry in _entries().items() for name in entry["names"])


def statements(subject: Subject) -> tuple[str, ...]:
    """Templates with one {} for the subject: unfinished statements that suit its kind, most with words before it."""
    return tuple(_entries()[subject.kind]["statements"])


@cache
def _entries() -> dict[str, dict[str, list[str]]]:
    import yaml

    text = resources.files("kpatch.stats").joinpath("subjects.yaml").read_text(encoding="utf-8")
    loader: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # every scalar is text
    entries: dict[str, dict[str, list[str]]] = yaml.load(text, Loader=loader)
    return entries
