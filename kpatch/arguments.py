"""Arguments from Python that are of another kind than a function takes: refused by what they are. No torch."""

from __future__ import annotations

from os import PathLike

from kpatch.errors import BadInput


def whole_number(value: object, name: str, least: int | None = None) -> None:
    """Raise BadInput unless `value` is a whole number, of `least` or more where that is given; None is left alone."""
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadInput(f"`{name}` is {value!r}, a {type(value).__name__}", details=["expected a whole number"])
    if least is not None and value < least:
        raise BadInput(f"`{name}={value}` is less than {least}", details=[f"expected {least} or more"])


def path(value: object, name: str) -> None:
    """Raise BadInput unless `value` can be a path."""
    if not isinstance(value, str | PathLike):
        raise BadInput(f"`{name}` is a {type(value).__name__}, not a path", details=["expected a text or a Path"])
