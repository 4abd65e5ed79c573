"""What apply and revert say at their end: the patches, and how each weight came through the rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpatch.cli.output import Output, percent

if TYPE_CHECKING:
    from kpatch.checkpoint.report import ApplyReport


def show_report(out: Output, report: ApplyReport, done: str, where: str) -> None:
    """Print what was done (or with --check would be), for people and as JSON."""
    out.result(report.to_dict())
    rows = [
        (weight.name, percent(weight.unchanged), percent(weight.delta_error), percent(weight.key_error))
        for weight in report.weights
        if weight.unchanged is not None
    ]
    out.table(("Weight", "Entries unchanged", "Lost in rounding", "At the facts' keys"), rows, right=(1, 2, 3))
    names = ", ".join(f"{patch['name']} ({patch['id'][:12]})" for patch in report.patches)
    weights = f"{len(report.weights)} weights, {report.seconds:.1f} s"
    out.line(f"{done} {names} {where} {report.model}: {weights}; state {report.state}")
