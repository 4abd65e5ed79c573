"""What a trace leaves on disk: trace.json with everything, pictures where they can be drawn, an HTML report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from kpatch.cache import atomic_write_text, write_error
from kpatch.errors import BadInput
from kpatch.models.model import Model
from kpatch.pictures import can_draw
from kpatch.trace.html import report_html
from kpatch.trace.plot import draw
from kpatch.trace.summary import Summary

SCHEMA_VERSION = 1
_HINT = "`kpatch trace MODEL --quick -o trace/` writes trace/trace.json"


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
    atomic_write_text(path, text)
    return [path, *files]


def write_html(summary: Summary, path: Path) -> Path:
    """Write the report as one HTML file. Raises KpatchError where it cannot be written."""
    atomic_write_text(path, report_html(summary))
    return path


def read_layers(path: str | Path, model: Model) -> list[int]:
    """R as a trace.json of `model` names it.

    Raises BadInput for a file that is no trace, one that found no R, and one of another model.
    """
    where = str(path)
    data = _read(Path(path))
    layers, curve = data.get("layers"), (data.get("severed") or {}).get("plain")
    if not isinstance(curve, list) or "total_effect" not in data:
        raise BadInput("This is not a trace", where=where, hint=_HINT)
    if data.get("model") != model.name or len(curve) != model.n_layers:
        raise BadInput(
            f"The trace was made of another model than {model.name}",
            where=where,
            details=[
                f"expected {model.name}, {model.n_layers} layers",
                f"found {data.get('model')}, {len(curve)} layers",
            ],
            hint=f"trace this one: {_HINT}",
        )
    if layers is None:
        raise BadInput("The trace found no layers to edit", where=where, hint="trace more facts, or give `layers`")
    if not isinstance(layers, list) or not layers or not all(type(layer) is int for layer in layers):
        raise BadInput("The trace's 'layers' is not a list of layers", where=where, hint=_HINT)
    return layers


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput("There is no such file", where=str(path), hint=_HINT) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput("This is not a trace", where=str(path), details=[str(error)], hint=_HINT) from error
    return data if isinstance(data, dict) else {}


def _finite(value: Any) -> Any:
    """NaN, where there was nothing to average, as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
