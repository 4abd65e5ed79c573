"""`kpatch apply`: patches onto a checkpoint directory, all or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kpatch.cli import options as opt
from kpatch.cli.output import begin
from kpatch.cli.tables import print_apply_report
from kpatch.cli.targets import remember_checkpoint

EXAMPLES = opt.examples("kpatch apply news.patch model/", "kpatch apply a.patch b.patch model/ -o patched/ --check")


def command(
    patches: Annotated[list[Path], typer.Argument(metavar="PATCH", help="Patch files; their order does not matter.")],
    model_dir: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A checkpoint directory.")],
    check: Annotated[bool, typer.Option("--check", help="Show what would happen, and write nothing.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="DIR", help="Leave MODEL_DIR alone and write a patched copy here."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With -o: float32, bfloat16 or float16, for all float weights of the copy."),
    ] = None,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Let a fact stand for one of an earlier patch that it contradicts."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace write-protected weight files.")] = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Apply patches to a checkpoint directory, all or nothing.

    `kpatch revert` takes them back, bit for bit. PyTorch .bin checkpoints can only be copied (-o), as safetensors.
    """
    output = begin(json, quiet, verbose)
    from kpatch.checkpoint.apply import apply

    report = apply(patches, model_dir, check=check, out=out, dtype=dtype, replace=replace, force=force, report=output)
    print_apply_report(output, report, "Would apply" if check else "Applied", "to")
    if not check and out is None:
        remember_checkpoint(model_dir.resolve())
    if not check:
        output.note(f"next: kpatch status {report.model}; kpatch revert {report.model}")
