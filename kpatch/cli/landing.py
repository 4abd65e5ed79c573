"""What apply and revert say at their end: the patches, and how each weight came through the rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpatch.cli.output import Output, percent

if TYPE_CHECKING:
    from kpatch.checkpoint.report import ApplyReport


def show_report(out: Output, report: ApplyReport, done: str, where: str) -> None:
    """Print what was done (or with --check would be), for people and as JSON."""
    out.result(report.to_dict())
    rows = [(w.name, percent(w.unchanged), percent(w.delta_error)) for w in report.weights if w.unchanged is not None]
    out.table(("Weight", "Entries unchanged", "Lost in rounding"), rows, right=(1, 2))
    names = ", ".join(f"{patch['name']} ({patch['id'][:12]})" for patch in report.patches)
    weights = f"{len(report.weights)} weights, {report.seconds:.1f} s"
    out.line(f"{done} {names} {where} {report.model}: {weights}; state {report.state}")
