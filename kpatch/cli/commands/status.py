"""`kpatch status`: what is applied to a checkpoint, and is it intact? Imports torch only to measure facts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from kpatch.cli import options as opt
from kpatch.cli.output import Output, begin, percent
from kpatch.cli.targets import default_checkpoint
from kpatch.text import counted, format_size

if TYPE_CHECKING:
    from kpatch.evaluate.health import PatchHealth

EXAMPLES = opt.examples("kpatch status model/", "kpatch status model/ --measure --json | jq .health")

_SHOWN = 10
_MEANING = {
    "clean": "as kpatch left it",
    "modified": "changed by something other than kpatch",
    "interrupted": "an apply or revert did not end",
}


def command(
    model_dir: opt.Checkpoint = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also load the model, and say which facts of each patch still hold.")
    ] = False,
    device: opt.Device = "auto",
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Say what is applied to a checkpoint, and whether it is intact."""
    output = begin(json, quiet, verbose)
    from kpatch.checkpoint.status import status

    chosen = default_checkpoint(output) if model_dir is None else model_dir
    found = status(chosen, output)
    health: Sequence[PatchHealth] = ()
    if measure:
        from kpatch.evaluate.health import health as measured

        health = measured(chosen, device=device, report=output)
    output.result({**found.to_dict(), **({"health": [one.to_dict() for one in health]} if measure else {})})
    busy = "; a kpatch is at work there now" if found.busy else ""
    output.line(f"{found.model}: {found.state} ({_MEANING.get(found.state, '')}{busy})")
    if found.base:
        output.line(f"base: {found.base}")
    if found.patches:
        rows = [(row["id"] if verbose else row["id"][:12], row["name"], row["facts"]) for row in found.patches]
        output.table(("Patch, bottom to top", "Name", "Facts"), rows, right=(2,))
        for row in found.patches:
            if row.get("replaced"):
                output.line(f"{row['name']}: {counted(row['replaced'], 'fact')} replaced by a later patch")
        output.line(f"{format_size(found.kept_bytes)} of original bytes kept")
    else:
        output.line("no patches applied")
    if health:
        _print_health(output, health)
    for name in found.changed:
        output.line(f"changed: {name}")
    if found.next:
        output.line(f"next: {found.next}")


def _print_health(output: Output, health: Sequence[PatchHealth]) -> None:
    """How many facts of each patch hold, and those that do not."""
    output.table(
        ("Patch", "Facts", "Hold"), [(one.name, one.facts, f"{one.held} of {one.facts}") for one in health], right=(1,)
    )
    fallen = [(one.name, fact) for one in health for fact in one.fallen]
    for name, fact in fallen if output.verbose else fallen[:_SHOWN]:
        output.line(f"does not hold: {fact['text']} {fact['target']} ({percent(fact['probability'])}; {name})")
    if len(fallen) > _SHOWN and not output.verbose:
        output.line(f"… and {len(fallen) - _SHOWN} more (-v shows all)")
