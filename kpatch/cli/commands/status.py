"""`kpatch status`: what is applied to a checkpoint, and is it intact? Never imports torch."""

from __future__ import annotations

from kpatch.cli import options as opt
from kpatch.cli.output import begin
from kpatch.cli.targets import default_checkpoint
from kpatch.text import counted, format_size

EXAMPLES = opt.examples("kpatch status model/", "kpatch status --json | jq .state")

_MEANING = {
    "clean": "as kpatch left it",
    "modified": "changed by something other than kpatch",
    "interrupted": "an apply or revert did not end",
}


def command(
    model_dir: opt.Checkpoint = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Say what is applied to a checkpoint, and whether it is intact."""
    output = begin(json, quiet, verbose)
    from kpatch.checkpoint.status import status

    found = status(default_checkpoint(output) if model_dir is None else model_dir, output)
    output.result(found.to_dict())
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
    for name in found.changed:
        output.line(f"changed: {name}")
    if found.next:
        output.line(f"next: {found.next}")
