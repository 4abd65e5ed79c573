"""Characters that nobody sees: texts that hold them, are nothing else, or differ in nothing else.

Zero-width joiners are part of emoji and of Indic and Persian spelling, and count as seen.
"""

from __future__ import annotations

import re
import unicodedata

_INVISIBLE = re.compile(
    "[\u00a0\u00ad\u034f\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202f\u2060-\u206f\u2800\u3164\ufeff\uffa0"
    "\U000e0000-\U000e001f]"
)
_WIDE = re.compile("[\u00a0\u2028\u2029\u202f\u2800\u3164]")  # these show as a space


def invisible_in(text: str) -> str | None:
    """The first invisible character of a text, as U+200B; None where there is none."""
    found = None if text.isascii() else _INVISIBLE.search(text)
    return found and f"U+{ord(found.group()):04X}"


def looks(text: str) -> str:
    """A text as it looks: without invisible characters, with one space between words, in one form of its letters."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", _WIDE.sub(" ", text)))
    return " ".join(text.split())


def is_blank(text: str) -> bool:
    """True for a text in which nothing can be seen."""
    return not looks(text)
