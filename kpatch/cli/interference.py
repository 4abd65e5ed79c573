"""How much patches move each other's keys, as a table: one row for each ordered pair, one column for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kpatch.cli.output import Cell, Output, percent

if TYPE_CHECKING:
    from kpatch.patch.header import PatchInfo
    from kpatch.patch.interference import Interference

# Of what a patch wrote: beyond this share another one is likely to change answers of its facts.
_MUCH = 0.5


def show_interference(
    out: Output, patches: Sequence[PatchInfo], found: Sequence[Interference], warn: bool = False
) -> None:
    """Print ‖Δ_a K_b‖ / ‖Δ_b K_b‖; with `warn` also warn of pairs where it is large."""
    if not found:
        out.line("interference: no two patches change a weight for which one of them stores keys")
        return
    layers = sorted({one.layer for one in found})
    names = _names(patches)
    rows: list[list[Cell]] = []
    for by, on in sorted({(one.by, one.on) for one in found}):
        mine = [one for one in found if (one.by, one.on) == (by, on)]
        most = max(mine, key=lambda one: one.worst)
        shares = [max((one.ratio for one in mine if one.layer == layer), default=None) for layer in layers]
        rows.append(
            [names[by], names[on], *(percent(share) for share in shares), f"{percent(most.worst)}  {most.fact}"]
        )
    headers = ("Delta of", "moves keys of", *(f"layer {layer}" for layer in layers), "most")
    out.table(headers, rows, right=tuple(range(2, 2 + len(layers))))
    much = {(one.by, one.on) for one in found if warn and one.ratio > _MUCH}
    for by, on in sorted(much):
        out.warn(
            f"{names[by]} moves keys of {names[on]} by more than {_MUCH:.0%} of what that wrote there; "
            f"facts of {names[on]} may be lost"
        )


def _names(patches: Sequence[PatchInfo]) -> list[str]:
    """The patches' names, with the beginning of the id where two are called the same."""
    names = [info.name for info in patches]
    return [f"{info.name} ({info.id[:8]})" if names.count(info.name) > 1 else info.name for info in patches]
