"""What a trace leaves on disk: trace.json with everything, pictures where they can be drawn, a report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from kpatch.cache import atomic_write, write_error
from kpatch.trace.html import report
from kpatch.trace.plot import can_draw, draw
from kpatch.trace.summary import Summary

SCHEMA_VERSION = 1


def write_folder(summary: Summary, folder: Path) -> list[Path]:
    """Write trace.json and, with matplotlib, the pictures into `folder`, which is made if need be; the files written.

    Raises KpatchError where it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(error, folder) from error
    files = draw(summary, folder) if can_draw() else []
    path = folder / "trace.json"
    names = [str(path), *map(str, files)]
    data = {"schema_version": SCHEMA_VERSION, **summary.to_dict(), "files": names, "per_fact": summary.per_fact()}
    text = json.dumps(_finite(data), ensure_ascii=False, allow_nan=False) + "\n"
    atomic_write(path, lambda temporary: _write_text(temporary, text))
    return [path, *files]


def write_html(summary: Summary, path: Path) -> Path:
    """Write the report."""
    text = report(summary)
    atomic_write(path, lambda temporary: _write_text(temporary, text))
    return path


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _finite(value: Any) -> Any:
    """NaN, where there was nothing to average, as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
