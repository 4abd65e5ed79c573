"""Typed reading of one JSON object of a manifest: each mistake named by its key and the rule it breaks. No torch."""

from __future__ import annotations

import re
from typing import Any

from kpatch.text import printable

FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")
MAX_DIMENSIONS = 8

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,254}")


class ManifestError(ValueError):
    """A manifest that breaks a rule; the message names the key and the rule."""


def is_sha256(text: object) -> bool:
    """Whether `text` is 64 lower-case hex digits (an id or a hash)."""
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None


def is_tensor_name(text: object) -> bool:
    """Whether `text` can name a weight: letters, digits, '_', '.', '-', at most 255 of them."""
    return isinstance(text, str) and _TENSOR_NAME.fullmatch(text) is not None


class Fields:
    """One JSON object being read: typed access that remembers which keys were asked for."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise ManifestError(f"{where}: must be an object")
        self.value, self.where, self.seen = value, where, set[str]()

    def error(self, key: str, rule: str) -> ManifestError:
        return ManifestError(f"{self.where}.{key}: {rule}")

    def any(self, key: str) -> Any:
        if key not in self.value:
            raise self.error(key, "is missing")
        self.seen.add(key)
        return self.value[key]

    def text(self, key: str) -> str:
        value = self.any(key)
        if not isinstance(value, str) or not value:
            raise self.error(key, "must be text")
        return value

    def optional_text(self, key: str) -> str | None:
        return None if self.any(key) is None else self.text(key)

    def integer(self, key: str, minimum: int = 0) -> int:
        value = self.any(key)
        if type(value) is not int or value < minimum:
            raise self.error(key, f"must be a whole number of at least {minimum}")
        return value

    def amount(self, key: str) -> float:
        value = self.any(key)
        if type(value) not in (int, float) or value < 0:
            raise self.error(key, "must be a number of at least 0")
        return value  # type: ignore[no-any-return]  # as written: 1 must not come back as 1.0

    def flag(self, key: str) -> bool:
        value = self.any(key)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def sha256(self, key: str) -> str:
        value = self.any(key)
        if not is_sha256(value):
            raise self.error(key, "must be 64 lower-case hex digits")
        return str(value)

    def dtype(self, key: str) -> str:
        value = self.any(key)
        if value not in FLOAT_DTYPES:
            raise self.error(key, f"must be one of {', '.join(FLOAT_DTYPES)}")
        return str(value)

    def shape(self, key: str) -> tuple[int, int]:
        value = self.any(key)
        if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and n >= 1 for n in value):
            raise self.error(key, "must be two sizes of at least 1")
        return value[0], value[1]

    def sizes(self, key: str) -> tuple[int, ...]:
        value = self.any(key)
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_DIMENSIONS:
            raise self.error(key, f"must be 1 to {MAX_DIMENSIONS} sizes")
        if not all(type(n) is int and n >= 1 for n in value):
            raise self.error(key, "must be sizes of at least 1")
        return tuple(value)

    def object(self, key: str) -> dict[str, Any]:
        value = self.any(key)
        if not isinstance(value, dict):
            raise self.error(key, "must be an object")
        return value

    def optional_object(self, key: str) -> dict[str, Any] | None:
        return None if self.any(key) is None else self.object(key)

    def array(self, key: str) -> list[Any]:
        value = self.any(key)
        if not isinstance(value, list):
            raise self.error(key, "must be a list")
        return value

    def each(self, key: str) -> list[tuple[str, Fields]]:
        """The entries of an object that maps tensor names to objects."""
        found = []
        for name, value in self.object(key).items():
            if not is_tensor_name(name):
                raise self.error(key, f"{printable(name, 80)!r} cannot name a tensor")
            found.append((name, Fields(value, f"{self.where}.{key}[{name}]")))
        return found

    def rest(self) -> dict[str, Any]:
        return {key: value for key, value in self.value.items() if key not in self.seen}
