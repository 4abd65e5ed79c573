"""What `show --memories` prints: each fact's writes, the units that they go through, and what those promoted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kpatch.cli.output import Cell, Output, clean, percent
from kpatch.cli.targets import open_model

if TYPE_CHECKING:
    from kpatch.memories.patch_view import FactWrite, TouchedUnit

_FACTS, _UNITS, _TOKENS = 5, 2, 4


def show_writes(output: Output, path: Path, address: str, whole: bool) -> None:
    """Load the model at `address`, look through it at what the patch writes, and print that; `whole` of all facts."""
    from kpatch.patch.format import read_patch

    patch = read_patch(path)
    model = open_model(output, address, "auto", "auto", None)
    from kpatch.memories.patch_view import to_dict, view_patch

    writes = view_patch(model, patch, report=output)
    output.result({"memories": [to_dict(one) for one in writes]})
    for one in writes if whole else writes[:_FACTS]:
        _print_fact(output, one)
    if not whole and len(writes) > _FACTS:
        output.line(f"… and the writes of {len(writes) - _FACTS} more facts (-v shows all)")


def _print_fact(output: Output, one: FactWrite) -> None:
    from kpatch.memories.words import listed

    output.line()
    output.line(clean(f"{one.fact.text()} → {one.fact.target}"))
    rows: list[tuple[Cell, ...]] = [
        (
            layer.layer,
            percent(layer.size),
            f"{layer.rank:,}",
            listed(layer.promotes, _TOKENS),
            "; ".join(_unit(unit) for unit in layer.units[:_UNITS]),
        )
        for layer in one.layers
    ]
    if one.together is not None and len(one.layers) > 1:
        rows.append(("all", "", f"{one.rank:,}", listed(one.together, _TOKENS), ""))
    output.table(
        ("Layer", "Δk/Wk", "Rank", "Written value promotes", "Through units, which promoted"), rows, (0, 1, 2)
    )


def _unit(unit: TouchedUnit) -> str:
    from kpatch.memories.words import listed

    return f"{unit.unit} ({percent(unit.share)}): {listed(unit.before, 3)}"
