"""`kpatch stack`: several patches as one, with what they do to each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kpatch.cli import options as opt
from kpatch.cli import parse
from kpatch.cli.output import Output, begin
from kpatch.cli.tables import print_interference, print_made
from kpatch.errors import BadInput
from kpatch.outputs import check_new_file
from kpatch.text import counted, format_size

if TYPE_CHECKING:
    from kpatch.patch.stack import StackResult

EXAMPLES = opt.examples(
    "kpatch stack a.patch b.patch -o ab.patch",
    "kpatch stack a.patch b.patch --scale 1 --scale 0.5 --check",
)


def command(
    patches: Annotated[list[Path], typer.Argument(metavar="PATCH", help="Patch files made for one model.")],
    out: opt.NewPatch = None,
    scale: Annotated[
        list[float] | None,
        typer.Option("--scale", metavar="FACTOR", help="For each patch in turn, a factor on its change; repeat it."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check whether the patches go together, and write nothing.")
    ] = False,
    resolve: Annotated[
        bool,
        typer.Option("--resolve", help="Solve all facts jointly again from the stored values, on the model itself."),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="For --resolve: the unpatched model. Default: as the patches call it."),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(metavar="self|PATH|NAME", help="For --resolve: text for the covariance. Default: the patches'."),
    ] = None,
    force: opt.Force = False,
    device: opt.Device = "auto",
    memory: opt.Memory = None,
    modules: opt.Modules = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Make one patch of several: what applying them together changes.

    Facts that contradict each other are refused; how much the patches disturb each other is shown.
    """
    output = begin(json, quiet, verbose)
    if check == (out is not None):
        raise BadInput(
            "--check writes nothing; leave out -o" if check else "-o is missing", hint="-o PATCH, or --check"
        )
    if resolve and (scale or check):
        raise BadInput("--resolve goes with -o alone: it solves facts as they are, without --scale or --check")
    if not resolve and (model or corpus or modules):
        raise BadInput("--model, --corpus and --modules are for --resolve; deltas are added up without the model")
    if resolve and out is not None:
        _resolve(output, patches, out, model, corpus, device, memory, modules, force)
        return
    from kpatch.patch.stack import stack

    result = stack(patches, out, scales=scale, force=force, report=output)
    _print_result(output, result)


def _resolve(
    output: Output,
    patches: list[Path],
    out: Path,
    model: str | None,
    corpus: str | None,
    device: str,
    memory: str | None,
    modules: str | None,
    force: bool,
) -> None:
    check_new_file(out, force=force, what="a patch")
    budget, names = parse.memory(memory), parse.modules(modules)
    from kpatch.edit.resolve import solve_again
    from kpatch.patch.stack import about_patches

    result = solve_again(
        patches,
        out,
        model=model,
        corpus=corpus,
        device=device,
        memory=budget,
        modules=names,
        force=force,
        report=output,
    )
    output.result(about_patches(result.patches, (1.0,) * len(result.patches), result.union, ()))
    print_made(output, result.made)


def _print_result(output: Output, result: StackResult) -> None:
    output.result(result.to_dict())
    print_interference(output, result.patches, result.interference, warn=True, together=result.together)
    facts = f"{counted(len(result.union.facts), 'fact')} of {len(result.patches)} patches"
    if result.path is None or result.id is None:
        output.line(f"{facts} go together; nothing was written")
        return
    ranks = sorted({weight["rank"] for weight in result.weights if weight["form"] == "lowrank"})
    rank = "" if not ranks else f", rank {ranks[0]}" if len(ranks) == 1 else f", ranks {ranks[0]} to {ranks[-1]}"
    weights = counted(len(result.weights), "weight")
    dense = sum(weight["form"] == "dense" for weight in result.weights)
    output.line(
        f"{result.path}  {result.id[:12]}  {format_size(result.bytes)}: {facts}, {weights}{rank}"
        f"{f', {dense} dense' if dense else ''}; {result.seconds:.1f} s"
    )
    output.note(f"next: kpatch show {result.path}; kpatch apply {result.path} MODEL_DIR")
