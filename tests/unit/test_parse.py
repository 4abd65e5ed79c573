"""Options that are small languages: what they take, and that everything else is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpatch.cli import parse
from kpatch.errors import BadInput


@pytest.mark.parametrize(
    ("text", "layers"),
    [("4-8", [4, 5, 6, 7, 8]), ("4,5,6", [4, 5, 6]), ("3-5, 8", [3, 4, 5, 8]), ("8,4,4", [4, 8]), ("0", [0])],
)
def test_layers(text: str, layers: list[int]) -> None:
    assert parse.layers(text) == layers


@pytest.mark.parametrize("text", ["", "8-4", "a", "4-", "-4", "1.5", "4;5", "4,,5", "0-99999999999", "4 5", "²"])
def test_layers_that_are_none(text: str) -> None:
    with pytest.raises(BadInput):
        parse.layers(text)


@given(st.sets(st.integers(0, 200), min_size=1))
def test_layers_written_out_are_read_back(layers: set[int]) -> None:
    assert parse.layers(",".join(map(str, layers))) == sorted(layers)


@given(st.text(max_size=20))
def test_any_text_is_layers_or_refused(text: str) -> None:
    try:
        found = parse.layers(text)
    except BadInput:
        return
    assert found == sorted(set(found or []))


def test_settings() -> None:
    assert parse.settings(["a=1", " b = x=y "]) == {"a": "1", "b": "x=y"}
    assert parse.settings([]) == {}


@pytest.mark.parametrize("pairs", [["a"], ["=1"], ["a="], ["a=1", "a=2"]])
def test_settings_that_are_none(pairs: list[str]) -> None:
    with pytest.raises(BadInput, match="--set"):
        parse.settings(pairs)


def test_modules() -> None:
    assert parse.modules(None) is None
    assert parse.modules("layers=m.h,down=fc2") == {"layers": "m.h", "down": "fc2"}
    with pytest.raises(BadInput, match="--modules"):
        parse.modules("layers")


@pytest.mark.parametrize(
    ("text", "size"), [("2GB", 2_000_000_000), ("1.5 MiB", 1_572_864), ("1000", 1000), ("3k", 3000), (None, None)]
)
def test_memory(text: str | None, size: int | None) -> None:
    assert parse.memory(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-1", "-1GB", "2 XB", "1e9", "nan", "0.4", "9" * 400 + "GB"])
def test_memory_that_is_none(text: str) -> None:
    with pytest.raises(BadInput, match="--memory"):
        parse.memory(text)
