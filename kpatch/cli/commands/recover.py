"""`kpatch recover`: end what an interrupted apply or revert began. Never imports torch."""

from __future__ import annotations

from kpatch.cli import options as opt
from kpatch.cli.output import begin
from kpatch.cli.targets import default_checkpoint

EXAMPLES = opt.examples("kpatch recover model/", "kpatch recover model/ --json")

_OUTCOME = {
    "nothing": "nothing to recover",
    "completed": "the interrupted {action} was completed: the new state",
    "undone": "the interrupted run was undone: the old state",
}


def command(
    model_dir: opt.Checkpoint = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Complete or undo an interrupted apply or revert."""
    output = begin(json, quiet, verbose)
    from kpatch.checkpoint.recover import recover

    done = recover(default_checkpoint(output) if model_dir is None else model_dir, output)
    output.result(done.to_dict())
    output.line(f"{done.model}: {_OUTCOME[done.outcome].format(action=done.action)}")
