"""JSON that means one thing only. No torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from kpatch.text import printable

MAX_DEPTH = 16
# Larger integers do not survive a trip through JSON readers that keep numbers as doubles.
MAX_INT = 2**53

_SURROGATE = re.compile("[\ud800-\udfff]|\\\\u[dD][89a-fA-F]")


class JsonError(ValueError):
    """Text that is not the strict JSON kpatch reads and writes; the message says why."""


def loads(text: str, max_depth: int = MAX_DEPTH) -> Any:
    """Parse strict JSON: no duplicate keys, no NaN or Infinity, no number out of range, bounded depth, valid Unicode.

    What it takes, `canonical` writes. Raises JsonError.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_bounded_int,
            parse_float=_finite_float,
        )
    except JsonError:
        raise
    except RecursionError:
        raise JsonError(f"nested deeper than {max_depth} levels") from None
    except ValueError as error:
        raise JsonError(f"not valid JSON: {error}") from None
    check_depth(value, max_depth)
    if _SURROGATE.search(text):  # perhaps one half of a character; both halves of one, which are right, pass here
        _text(json.dumps(value, ensure_ascii=False))
    return value


def check_depth(value: Any, max_depth: int = MAX_DEPTH) -> None:
    """Raise JsonError when lists and objects nest deeper than `max_depth`."""
    level = [value]
    for _ in range(max_depth + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(child for child in item.values() if isinstance(child, (dict, list)))
            elif isinstance(item, list):
                below.extend(child for child in item if isinstance(child, (dict, list)))
        if not below:
            return
        level = below
    raise JsonError(f"nested deeper than {max_depth} levels")


def canonical(value: Any, depth: int = 0) -> str:
    """The one JSON text of a value: keys sorted, no spaces, UTF-8 as is, floats shortest that read back the same.

    Tuples become lists. Raises JsonError for anything that would not read back equal: NaN, Inf, an integer beyond
    2^53, a key that is not text, a lone surrogate, another type, and for more than MAX_DEPTH levels, `depth` of them
    around the value.
    """
    return json.dumps(plain(value, depth), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_object(parts: Mapping[str, str]) -> str:
    """The canonical text of an object from those of its values, a level deeper. Raises JsonError for its keys."""
    plain(dict.fromkeys(parts))
    return "{" + ",".join(f"{canonical(key)}:{parts[key]}" for key in sorted(parts)) + "}"


def plain(value: Any, depth: int = 0) -> Any:
    """A copy made of dict, list, str, bool, int, float and None only. Raises JsonError as `canonical` does."""
    if depth > MAX_DEPTH and isinstance(value, (dict, list, tuple)):
        raise JsonError(f"nested deeper than {MAX_DEPTH} levels")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        if abs(value) > MAX_INT:
            raise JsonError("an integer beyond 2^53")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise JsonError("a number that is not finite")
        return float(value)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise JsonError(f"a key that is not text: {key!r}")
        return {_text(key): plain(child, depth + 1) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(child, depth + 1) for child in value]
    raise JsonError(f"a value of type {type(value).__name__}")


def _text(value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise JsonError("text that is not valid Unicode (a lone surrogate)") from None
    return str(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise JsonError(f"the key {printable(key, 80)!r} occurs twice")
            seen.add(key)
    return found


def _no_constant(name: str) -> Any:
    raise JsonError(f"a number that is not finite ({name})")


def _bounded_int(text: str) -> int:
    value = int(text) if len(text) <= 20 else MAX_INT + 1
    if abs(value) > MAX_INT:
        raise JsonError("an integer beyond 2^53")
    return value


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonError("a number that is not finite")
    return value
