"""Problems of files that people write: collected with their places, reported at once, with what a typo may mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from kpatch.errors import BadInput


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word`, letter case aside; None where nothing is near."""
    folded = {name.casefold(): name for name in known}
    found = get_close_matches(word.casefold()[:200], folded, n=1)
    return folded[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """A message's end: "; did you mean 'target'?", else `otherwise`."""
    name = nearest(word, known)
    return f"; did you mean {name!r}?" if name else otherwise


# Keys and list positions from the file's top: ("facts", 17, "neighbors", 0, "prompt")
Path = tuple[str | int, ...]
SHOWN = 50


class Kind(NamedTuple):
    """What messages call a kind of file, and the page that describes it."""

    name: str
    page: str


FACT_FILE = Kind("fact file", "docs/facts.md")


class Spot(NamedTuple):
    """A place in a file; both count from 1, columns in characters."""

    line: int
    column: int


class Target(NamedTuple):
    """What a problem points at: the value at `path`, or with `key` the key that leads to it."""

    path: Path
    key: bool = False


class Problems:
    """Collects what is wrong; the places of targets are only looked up for the problems that are shown."""

    def __init__(self, kind: Kind = FACT_FILE) -> None:
        self.kind = kind
        self._found: list[tuple[Target | Spot, str]] = []

    def __len__(self) -> int:
        return len(self._found)

    @property
    def messages(self) -> list[str]:
        """What is wrong, without its places."""
        return [message for _, message in self._found]

    def add(self, path: Path, message: str, key: bool = False) -> None:
        self._found.append((Target(path, key), message))

    def add_at(self, spot: Spot, message: str) -> None:
        self._found.append((spot, message))

    def raise_any(self, name: str, locate: Callable[[Sequence[Target]], Sequence[Spot]]) -> None:
        """Raise BadInput with every problem as "name:line:column: message"; nothing happens where there are none."""
        if not self._found:
            return
        shown = self._found[:SHOWN]
        wanted = [place for place, _ in shown if isinstance(place, Target)]
        places = iter(locate(wanted) if wanted else [])
        spots = [place if isinstance(place, Spot) else next(places) for place, _ in shown]
        lines = sorted(zip(spots, (message for _, message in shown), strict=True), key=lambda pair: pair[0])
        raise bad_file(name, [f"{at(name, spot)}: {message}" for spot, message in lines], len(self._found), self.kind)


def at(name: str, spot: Spot) -> str:
    """The form "news.yaml:14:5", which terminals and editors turn into a link."""
    return f"{name}:{spot.line}:{spot.column}"


def bad_file(name: str, lines: Sequence[str], total: int | None = None, kind: Kind = FACT_FILE) -> BadInput:
    """The error for a file with `total` things wrong, of which `lines` tells the first."""
    count = len(lines) if total is None else total
    what = "1 error" if count == 1 else f"{count:,} errors"
    return BadInput(
        f"The {kind.name} has {what}",
        where=name,
        details=limited(lines, total=count),
        hint=f"{kind.page} describes the format",
    )


def cut(text: str, length: int = 80) -> str:
    """`text` short enough for a message."""
    return text if len(text) <= length else text[: length - 1] + "…"


def limited(lines: Iterable[str], total: int | None = None, shown: int = SHOWN) -> tuple[str, ...]:
    """The first `shown` lines and "and N more"."""
    every = list(lines)
    count = len(every) if total is None else total
    kept = every[:shown]
    return (*kept, f"and {count - len(kept):,} more") if count > len(kept) else tuple(kept)
