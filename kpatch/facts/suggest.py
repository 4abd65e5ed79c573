"""Did you mean: the nearest known word for a mistyped one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word`, letter case aside; None where nothing is near."""
    folded = {name.casefold(): name for name in known}
    found = get_close_matches(word.casefold()[:200], folded, n=1)
    return folded[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """A message's end: "; did you mean 'target'?", else `otherwise`."""
    name = nearest(word, known)
    return f"; did you mean {name!r}?" if name else otherwise
