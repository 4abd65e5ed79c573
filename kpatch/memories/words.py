"""Words for people: what figures are called, and tokens and texts with white space made visible, cut to their ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Whose prediction leaves a layer, and which token a trigger loses
NAMES = {
    "residual": "residual stream's",
    "agreement": "both agree",
    "ffn": "feed-forward layer's",
    "composition": "neither's",
}
LOSSES = {"first": "its first", "last": "its last", "other": "another"}
_SHOWN = str.maketrans({"\n": "⏎", "\t": "⇥"})


def shown(token: str) -> str:
    """A token by itself: without the space in front, unless it is nothing else."""
    text = token.translate(_SHOWN)
    return text.strip(" ") or text.replace(" ", "␣") or "∅"


def ending(text: str, most: int) -> str:
    """The end of a text, at most that many characters, on one line."""
    line = text.translate(_SHOWN)
    return line if len(line) <= most else f"…{line[-most + 1 :]}"


def listed(promotes: Sequence[tuple[str, float]], most: int) -> str:
    """The first tokens of a list, with middle dots between them."""
    return " · ".join(shown(token) for token, _ in promotes[:most])


def as_objects(promotes: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """Tokens and their probabilities for JSON."""
    return [{"token": token, "probability": chance} for token, chance in promotes]
