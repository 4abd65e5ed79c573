"""Values of options that are small languages of their own: layers, key=value pairs, sizes."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kpatch.errors import BadInput
from kpatch.facts.questions import FORMS
from kpatch.text import parse_ranges

_UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "t": 10**12, "tb": 10**12, "tib": 1 << 40}


def layers(text: str | None) -> list[int] | None:
    """`4-8`, `4,5,6` or `3-5,8` as rising layer numbers; None stays None. Raises BadInput."""
    if text is None:
        return None
    try:
        return parse_ranges(text)
    except ValueError as error:
        raise BadInput(
            f"--layers {text!r} is not a list of layers",
            details=[f"{error} is not a range"],
            hint="write 4-8, or 4,5,6",
        ) from error


def settings(pairs: Sequence[str]) -> dict[str, str]:
    """Repeated `--set key=value`. Raises BadInput for a pair without =, and for a key given twice."""
    return _pairs(pairs, "--set")


def modules(text: str | None) -> dict[str, str] | None:
    """`layers=model.layers,down=mlp.down_proj` as a table; None stays None. Raises BadInput."""
    return None if text is None else _pairs(text.split(","), "--modules")


def dtype(name: str, exact: bool) -> str:
    """`--dtype NAME`, or float32 for `--exact`. Raises BadInput where they say different things."""
    if exact and name not in ("auto", "float32"):
        raise BadInput(f"`exact` is float32, and `dtype` is {name}", hint="leave one of them out")
    return "float32" if exact else name


def forms(text: str | None) -> tuple[str, ...]:
    """`completion,question,chat` or some of them; None is none of them. Raises BadInput for others."""
    given = () if text is None else tuple(part.strip() for part in text.split(","))
    if any(part not in FORMS for part in given):
        raise BadInput(f"--forms {text!r} is not a list of forms", details=[f"expected some of {', '.join(FORMS)}"])
    return given


def memory(text: str | None) -> int | None:
    """`2GB`, `512MiB` or a plain number of bytes; None stays None. Raises BadInput."""
    return None if text is None else _size(text, "--memory")


def max_memory(text: str | None) -> int | dict[str, int] | None:
    """`8GB` for each device, or `cuda:0=20GB,cpu=30GB`; None stays None. Raises BadInput."""
    if text is None:
        return None
    if "=" not in text:
        return _size(text, "--max-memory")
    return {name: _size(size, "--max-memory") for name, size in _pairs(text.split(","), "--max-memory").items()}


def _size(text: str, option: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or not 1 <= float(match[1]) * unit < float("inf"):
        raise BadInput(f"{option} {text!r} is not a size", hint="write 2GB or 512MiB")
    return int(float(match[1]) * unit)


def _pairs(pairs: Sequence[str], option: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not key or not equals or not value:
            raise BadInput(f"{option} {pair!r} is not key=value")
        if key in found:
            raise BadInput(f"{option} gives {key} twice", details=[f"found {found[key]} and {value}"])
        found[key] = value
    return found
