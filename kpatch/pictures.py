"""Pictures in one style, as PNG and SVG. Needs matplotlib (the extra `plot`), imported when one is drawn."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kpatch.cache import atomic_write
from kpatch.errors import BadInput

_DPI = 110
_STYLE = {"font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "svg.hashsalt": "kpatch"}


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


@contextmanager
def style(more: Mapping[str, Any] | None = None) -> Iterator[None]:
    """While open, figures have kpatch's fonts and sizes, and `more` of matplotlib's settings.

    Raises BadInput without matplotlib.
    """
    if not can_draw():
        raise BadInput("Pictures need matplotlib", hint="pip install 'kpatch[plot]'")
    import matplotlib

    with matplotlib.rc_context({**_STYLE, **(more or {})}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # a box stands in its place
        yield


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """Write a figure as name.png and name.svg into `folder`, without the time or the program; the files written."""
    files = []
    for suffix, about in (("png", {"Software": None}), ("svg", {"Date": None})):
        path = folder / f"{name}.{suffix}"

        def write(temporary: Path, suffix: str = suffix, about: dict[str, Any] = about) -> None:
            figure.savefig(temporary, format=suffix, dpi=_DPI, metadata=about, bbox_inches="tight")

        atomic_write(path, write)
        files.append(path)
    return files
