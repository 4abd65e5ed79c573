"""What a patch will take, as `kpatch make --plan` prints it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpatch.cli.output import Output
from kpatch.text import format_size, ranges

if TYPE_CHECKING:
    from kpatch.edit.forecast import Forecast


def print_forecast(output: Output, found: Forecast) -> None:
    """One object with `--json`, else three tables' worth of lines."""
    output.result(found.to_dict())
    output.line(
        f"{found.model}, {found.method}: {found.facts} facts in {found.rows} rows, layers {ranges(found.layers)}"
    )
    if found.earlier:
        output.line(f"earlier patches: {found.earlier} facts that are held or learned again")
    missing = found.covariance["missing"]
    text = f"{found.covariance['tokens']:,} tokens of {found.covariance['corpus']}"
    output.line(f"covariance, {text}: {'layers ' + ranges(missing) + ' to collect' if missing else 'in the cache'}")
    for name, sizes in (("memory", found.memory), ("disk", found.disk)):
        parts = ", ".join(f"{part.replace('_', ' ')} {format_size(size)}" for part, size in sizes.items())
        output.line(f"{name:7} {parts}")
    output.line("seconds " + ", ".join(f"{part} {seconds:.0f}" for part, seconds in found.seconds.items()))
    output.line(f"time: {found.how}")
