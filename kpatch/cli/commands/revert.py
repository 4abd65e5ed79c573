"""`kpatch revert`: patches off a checkpoint directory again, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kpatch.cli import options as opt
from kpatch.cli.output import begin
from kpatch.cli.tables import print_apply_report
from kpatch.cli.targets import default_checkpoint, forget_checkpoint
from kpatch.errors import BadInput

EXAMPLES = opt.examples("kpatch revert", "kpatch revert news.patch model/")


def command(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATCH|MODEL_DIR",
            help="Patches by file, id or beginning of an id (default: the top one), and a checkpoint directory"
            " (default: the one here, else the one last applied to).",
        ),
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Take every patch back.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Show what would happen, and write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace write-protected weight files.")] = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Take patches back, bit for bit.

    What stays is as if they had never been applied.
    """
    output = begin(json, quiet, verbose)
    patches, model_dir = _split(arguments or [])
    if all_ and patches:
        raise BadInput("--all takes every patch back; name none beside it")
    if model_dir is None:
        model_dir = default_checkpoint(output)

    from kpatch.checkpoint.revert import revert

    report = revert(model_dir, patches or None, all=all_, check=check, force=force, report=output)
    if not check and not report.plan.stack:
        forget_checkpoint(model_dir.resolve())
    print_apply_report(output, report, "Would revert" if check else "Reverted", "from")


def _split(arguments: list[str]) -> tuple[list[str], Path | None]:
    """The last argument is the checkpoint where it is a directory, or looks like one; the others are patches."""
    if arguments and (Path(arguments[-1]).is_dir() or arguments[-1].endswith("/")):
        return arguments[:-1], Path(arguments[-1])
    return arguments, None
