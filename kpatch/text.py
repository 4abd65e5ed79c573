"""Text for people: what comes from files made safe to show (all output does that), and counts and sizes in words."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Control characters, the characters that reorder or end a line, byte order marks, lone surrogates and tag characters.
# Joiners (U+200C, U+200D) stay: scripts and emoji need them.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str, limit: int | None = None) -> str:
    """Text from a file made safe for a terminal line: control and reordering characters become visible escapes.

    With `limit`, at most that many characters, the last one an ellipsis. Markup of a terminal library is not touched.
    """
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    return _UNSAFE.sub(lambda match: _escape(ord(match.group())), text)


def _escape(code: int) -> str:
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def counted(count: int, noun: str) -> str:
    """A number and what is counted, whose plural ends in s: 1 prompt, 2,000 prompts."""
    return f"{count:,} {noun}{'' if count == 1 or not noun else 's'}".strip()


def format_size(count: int | None) -> str:
    """A number of bytes as people read it: 1.2 MB."""
    number = float(count or 0)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    raise AssertionError


_RANGE = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")
_MOST = 10_000


def parse_ranges(text: str) -> list[int]:
    """`4-8`, `4,5,6` or `3-5,8` as rising numbers below 10,000. Raises ValueError with the part that is wrong."""
    found: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last >= _MOST:
            raise ValueError(part.strip())
        found.update(range(first, last + 1))
    return sorted(found)


def ranges(numbers: Sequence[int]) -> str:
    """Rising numbers for people: 0, 1, 2, 5 → 0-2, 5."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in found)
