"""Whether a space belongs between a prompt and what follows it."""

from __future__ import annotations

_OPENING = frozenset("([{<“‘‚„«‹「『（【《〈〔［｛¿¡")
_STRAIGHT = frozenset("\"'`")

# Scripts that put no space between words; Korean does
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x2FFF),  # Han radicals
    (0x3001, 0x312F),  # CJK signs, kana, bopomofo
    (0x31A0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF01, 0xFF9F),  # full-width signs, half-width kana
    (0x20000, 0x3FFFF),
)


def separator(text: str, target: str) -> str:
    """One space or nothing, by how people write: none behind an opening quote, nor inside Chinese or Thai."""
    if not text or not target or text[-1].isspace() or opens(text):
        return ""
    return "" if unspaced(text[-1]) and unspaced(target[0]) else " "


def opens(text: str) -> bool:
    """True when `text` ends in an opening quote or bracket; a straight quote opens behind a space only."""
    if text[-1] in _STRAIGHT:
        return len(text) == 1 or text[-2].isspace() or opens(text[:-1])
    return text[-1] in _OPENING


def unspaced(sign: str) -> bool:
    """True for a character of a script that is written without spaces."""
    code = ord(sign)
    return code >= 0x0E00 and any(first <= code <= last for first, last in _UNSPACED)
