from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kpatch.patch.canonical_json import JsonError, canonical, loads
from kpatch.text import printable

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)


@settings(deadline=None)
@given(VALUES)
def test_canonical_json_reads_back_equal_and_is_one_text(value: Any) -> None:
    text = canonical(value)
    assert canonical(loads(text)) == text
    assert loads(text) == value
    assert json.loads(text) == value


def test_canonical_sorts_and_leaves_no_space() -> None:
    assert canonical({"b": (1, 2.5), "a": "Zürich"}) == '{"a":"Zürich","b":[1,2.5]}'


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, 2**53 + 1, {1: 2}, "\ud800", {"\udfff": 1}, object(), b"x", {"a": {1, 2}}]
)
def test_what_json_cannot_carry_is_refused(value: Any) -> None:
    with pytest.raises(JsonError):
        canonical(value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a":1,"a":2}', "occurs twice"),
        ('{"a":{"b":1,"b":1}}', "occurs twice"),
        ("NaN", "not finite"),
        ("-Infinity", "not finite"),
        ("1e999", "not finite"),
        ("9" * 30, "2\\^53"),
        ("9" * 9999, "2\\^53"),
        ("[" * 5000 + "]" * 5000, "deeper"),
        ("[" * 200_000, "deeper"),
        ("[" * 18 + "]" * 18, "deeper"),
        ('{"a":' * 18 + "1" + "}" * 18, "deeper"),
        ("{'a': 1}", "not valid"),
        ("", "not valid"),
        ("1 2", "not valid"),
        (r'"\ud800"', "lone surrogate"),
        (r'[{"\uDFFF": 1}]', "lone surrogate"),
        ('"\ud800"', "lone surrogate"),
    ],
)
def test_json_with_two_meanings_or_none_is_refused(text: str, reason: str) -> None:
    with pytest.raises(JsonError, match=reason):
        loads(text)


def test_depth_sixteen_is_allowed() -> None:
    assert loads("[" * 16 + "]" * 16)


def test_escaped_halves_of_one_character_are_that_character() -> None:
    assert loads(r'"\ud83d\ude00 \\ud800"') == "😀 \\ud800"


# Every kind of string an escape can make, lone halves among them
STRINGS = st.text(st.characters(), max_size=3) | st.sampled_from(["\ud800", "a\udfff", "\ud83d\ude00"])
ANY = st.recursive(
    st.none() | NUMBERS | STRINGS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


@settings(deadline=None)
@given(ANY, st.integers(0, 18), st.booleans())
def test_what_is_read_can_be_written_again(value: Any, depth: int, escaped: bool) -> None:
    """A record that reads and then cannot be written would stop a commit halfway."""
    for _ in range(depth):
        value = [value]
    try:
        found = loads(json.dumps(value, ensure_ascii=escaped))
    except JsonError:
        return
    assert loads(canonical(found)) == found


@settings(deadline=None)
@given(st.text())
def test_printable_text_cannot_steer_a_terminal(text: str) -> None:
    shown = printable(text)
    assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in shown)
    assert not set(shown) & set("\u202e\u2066\u2028\ufeff")
    assert printable(shown) == shown
    shown.encode("utf-8")


def test_printable_keeps_what_people_write() -> None:
    for text in ("Zürich", "東京", "👩‍🚀", "می‌خواهم", "a b", "[bold]"):
        assert printable(text) == text
    assert printable("\x1b[31mred\n") == "\\x1b[31mred\\x0a"
    assert printable("a\u202eb\U000e0041") == "a\\u202eb\\U000e0041"
    assert printable("abcdef", 4) == "abc…"
