"""The layers that a trace found, from the trace.json that `kpatch trace -o` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpatch.errors import BadInput

if TYPE_CHECKING:
    from kpatch.models.model import Model

_HINT = "`kpatch trace MODEL --quick -o trace/` writes trace/trace.json"


def traced_layers(path: str | Path, model: Model) -> list[int]:
    """R as found by a trace of `model`.

    Raises BadInput for a file that is no trace, one that found no R, and one of another model.
    """
    data = _read(Path(path))
    where = str(path)
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
        raise BadInput("The trace found no layers to edit", where=where, hint="trace more facts, or give --layers")
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
