"""`kpatch stack`: several patches as one, with what they do to each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kpatch.cli import options as opt
from kpatch.cli.interference import show_interference
from kpatch.cli.output import Output, begin, size
from kpatch.errors import BadInput

if TYPE_CHECKING:
    from kpatch.patch.stack import StackResult

EXAMPLES = opt.examples(
    "kpatch stack a.patch b.patch -o ab.patch",
    "kpatch stack a.patch b.patch --scale 1 --scale 0.5 --check",
)


def command(
    patches: Annotated[list[Path], typer.Argument(metavar="PATCH", help="Patch files made for one model.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="PATCH", help="The file to write.")] = None,
    scale: Annotated[
        list[float] | None,
        typer.Option("--scale", metavar="FACTOR", help="For each patch in turn, a factor on its change; repeat it."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Say how the patches go together, and write nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over an existing file.")] = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Make one patch of several: the sum of what they change.

    Facts that contradict each other are refused; how much the patches disturb each other is said.
    """
    say = begin(json, quiet, verbose)
    if check == (out is not None):
        raise BadInput(
            "--check writes nothing; leave out -o" if check else "-o is missing", hint="-o PATCH, or --check"
        )
    from kpatch.patch.stack import stack

    result = stack(patches, out, scales=scale, force=force, report=say)
    _tell(say, result)


def _tell(say: Output, result: StackResult) -> None:
    say.result(result.to_dict())
    show_interference(say, result.patches, result.interference)
    facts = f"{len(result.union.facts)} facts of {len(result.patches)} patches"
    if result.path is None or result.id is None:
        say.line(f"{facts} go together; nothing was written")
        return
    ranks = sorted({weight["rank"] for weight in result.weights if weight["form"] == "lowrank"})
    rank = "" if not ranks else f", rank {ranks[0]}" if len(ranks) == 1 else f", ranks {ranks[0]} to {ranks[-1]}"
    dense = sum(weight["form"] == "dense" for weight in result.weights)
    say.line(
        f"{result.path}  {result.id[:12]}  {size(result.bytes)}: {facts}, {len(result.weights)} weights{rank}"
        f"{f', {dense} dense' if dense else ''}; {result.seconds:.1f} s"
    )
    say.note(f"next: kpatch show {result.path}; kpatch apply {result.path} MODEL_DIR")
