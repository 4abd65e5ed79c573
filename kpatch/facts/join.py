"""What stands between a prompt and its target: a space or nothing, by how people write.

The one place that knows. Rows that are learned, rows that are measured and `lint` all ask here. A fact's `space` key
wins over every rule.
"""

from __future__ import annotations

import re
import unicodedata

# All white space but line ends and tabs: those are written on purpose, as at the end of a chat prompt; and behind a
# text no-break spaces are too, as in « Rome and 5 €
_SPACES_BEFORE = re.compile(r"\A[^\S\n\t]+")
_SPACES_BEHIND = re.compile(r"[^\S\n\t\u00a0\u202f]+\Z")

_BRACKETS = frozenset("([{<「『（【《〈〔［｛¿¡")
_STRAIGHT = frozenset("\"'`*")  # the same sign opens and closes; * is Markdown's
# Quotes that open, with the quote of another style that they close instead: „Rom“ and »Rom«
_OPENING = {"„": "", "‚": "", "‟": "", "“": "„‟", "‘": "‚", "«": "»", "‹": "›"}
# Quotes that close, but open behind a space (Swedish ”Rom”, German »Rom«) unless one of these is still open
_CLOSING = {"”": "“„", "’": "‘‚", "»": "«", "›": "‹"}
_ALWAYS_JOINED = frozenset("@/\\_\u2011\u200b\u2060")  # nothing stands behind these: a handle, a path, snake_case
# French and Italian words that lose their last vowel: l'Italie, d'Oslo, dell'Umbria
_ELIDED = re.compile(
    r"(?<!['’‘])(?:\b(?:[cdjlmnst]|(?:jus|lors|puis|quoi)?qu|dell|all|dall|nell|sull|un|quest|sant|gl)|\bO)['’]\Z",
    re.IGNORECASE,
)
_MARKER = re.compile(r"<[^<>/\s][^<>\s]*>\Z")  # <|assistant|>, <answer>: what follows stands right behind
_EMPHASIS = re.compile(r"(?:^|\s)_[^\s_][^_]*_\Z")  # _Hamlet_
_ADDRESS = re.compile(r"\bwww\.\Z|(?:://|@)\S+\.\Z", re.IGNORECASE)  # www.|rome.it, https://rome.|it, me@rome.|it
_FEET = re.compile(r"\d['′]\Z")  # 5'|11
_NOTE = re.compile(r"\b[A-G]#\Z")  # C#, the language and the note
_CONTRACTION = re.compile(r"['’](?:s|re|ve|ll|d|t|m)\b", re.IGNORECASE)
_ORDINAL = re.compile(r"(?:st|nd|rd|th)\b")  # 5|th
_NO_SPACE_BEFORE = frozenset("%‰‱°¢′″²³¹,.;:!?…،؛؟।॥።፣)]}™®")
_DEGREE = re.compile(r"(?:[CFKNESW]\b|\d)")

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


def trimmed(text: str) -> str:
    """A prompt without the spaces around it. Line ends, tabs and a no-break space at its end stay."""
    if text == text.strip():  # nearly always
        return text
    return without_spaces_behind(_SPACES_BEFORE.sub("", text))


def without_spaces_behind(text: str) -> str:
    """A text without the spaces at its end, which `join` puts there where they belong."""
    return _SPACES_BEHIND.sub("", text) if text[-1:].isspace() else text


def join(text: str, target: str, space: bool | None = None) -> str:
    """What stands between `text` (a prompt with its subject) and `target`: " " or "".

    `space` is the fact's own key and wins; None leaves it to the rules of writing. Nothing follows white space.
    """
    if not text or not target or text[-1].isspace():
        return ""
    if space is None:
        space = not (_holds_on(text, target) or _leans_back(text, target))
    return " " if space else ""


def _holds_on(text: str, target: str) -> bool:
    """True where the prompt's end takes what follows without a space."""
    last, before = text[-1], text[:-1]
    behind_space = not before or before[-1].isspace() or opens(before)
    digit_follows = target[0].isdecimal()
    if opens(text) or _MARKER.search(text):
        return True
    if last in _ALWAYS_JOINED:
        return not _EMPHASIS.search(text)
    if last == "." and not target[0].isupper():
        return _ADDRESS.search(text) is not None
    if last == "#":
        return not _NOTE.search(text)
    if last == "-":  # non-|fiction, -|5, --|verbose; but Capital -| Paris
        return not behind_space or digit_follows
    if last in "+±−~≈":  # a sign before a number; but C++| developer
        return behind_space and digit_follows
    if last in "&=–—―":  # these have a space on both sides or on none
        return not behind_space
    if unicodedata.category(last) == "Sc":  # $|5, US$|5, $|AAPL; but 50 €| a month
        return not before.rstrip()[-1:].isdecimal() and (last == "$" or digit_follows)
    if last == "°":
        return _DEGREE.match(target) is not None
    if digit_follows and _FEET.search(text):
        return True
    if last in "'’" and target[0].isalpha():
        return _ELIDED.search(text) is not None
    if is_unspaced(last):
        return is_unspaced(target[0]) or (_is_east_asian(last) and digit_follows) or _is_punctuation(last)
    return False


def _leans_back(text: str, target: str) -> bool:
    """True where the target's beginning stands right behind what is before it."""
    first, second = target[0], target[1:2]
    if unicodedata.category(first)[0] == "M" or first == "\u200d":  # marks that stand on what is before them
        return True
    if first in "'’":  # 's, 'll, a closing quote; but '90s and 'tis
        return _CONTRACTION.match(target) is not None or not second.isalnum()
    if first in '"”»›':  # closes, unless a word begins behind it
        return not second.isalnum()
    if first == "." and second.isalnum():  # .com and 3|.5; but costs| .5 million, built with| .NET
        return text[-1].isdecimal() or second.islower() or is_unspaced(second)
    if first == "!" and second.isalpha():  # a click: !Kung
        return False
    if first in _NO_SPACE_BEFORE:
        return True
    if text[-1].isdecimal() and _ORDINAL.match(target):
        return True
    if _is_east_asian(first):  # 1984|年, and full-width signs
        return text[-1].isdecimal() or (_is_punctuation(first) and not opens(first))
    return False


def opens(text: str) -> bool:
    """True when `text` ends in an opening quote or bracket; a straight quote opens behind a space only."""
    if not text:
        return False
    sign, before = text[-1], text[:-1]
    if sign in _BRACKETS and sign not in _OPENING:
        return True
    if sign in _OPENING:
        return not _unclosed(before, _OPENING[sign], sign)
    if sign in _STRAIGHT or sign in _CLOSING:
        behind_space = not before or before[-1].isspace() or opens(before)
        return behind_space and not _unclosed(before, _CLOSING.get(sign, ""), sign)
    return False


def _unclosed(text: str, openers: str, closer: str) -> bool:
    return sum(text.count(opener) for opener in openers) > text.count(closer)


def _is_east_asian(sign: str) -> bool:
    return ord(sign) >= 0x2E80 and is_unspaced(sign)


def _is_punctuation(sign: str) -> bool:
    return unicodedata.category(sign)[0] == "P"


def is_unspaced(sign: str) -> bool:
    """True for a character of a script that is written without spaces."""
    code = ord(sign)
    return code >= 0x0E00 and any(first <= code <= last for first, last in _UNSPACED)
