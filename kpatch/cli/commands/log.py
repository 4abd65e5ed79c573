"""`kpatch log`: what was applied to a checkpoint and taken back, and when. Never imports torch."""

from __future__ import annotations

from kpatch.cli import options as opt
from kpatch.cli.output import begin
from kpatch.cli.targets import default_checkpoint

EXAMPLES = opt.examples("kpatch log model/", "kpatch log model/ --json | jq .entries")


def command(
    model_dir: opt.Checkpoint = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Say what was applied to a checkpoint and taken back, and when.

    The log goes with the last patch: a checkpoint without one is as it was before kpatch.
    """
    output = begin(json, quiet, verbose)
    from kpatch.checkpoint.status import history

    found = history(default_checkpoint(output) if model_dir is None else model_dir)
    output.result(found.to_dict())
    rows = []
    for entry in found.entries:
        shown = [f"{name} ({identity if verbose else identity[:12]})" for identity, name in entry.patches]
        rows.append((entry.time, entry.action, ", ".join(shown)))
    output.table(("Time", "Action", "Patches"), rows)
    if not rows:
        output.line(f"{found.model}: no patches applied, so no log is kept")
