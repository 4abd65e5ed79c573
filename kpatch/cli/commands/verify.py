"""`kpatch verify`: is a patch whole, and does it fit a checkpoint?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kpatch.cli import options as opt
from kpatch.cli.output import begin
from kpatch.errors import CheckFailed
from kpatch.text import counted

EXAMPLES = opt.examples("kpatch verify news.patch", "kpatch verify news.patch model/")


def command(
    patch: opt.Patch,
    model_dir: Annotated[
        Path | None, typer.Argument(metavar="MODEL_DIR", help="A checkpoint directory that it shall fit.")
    ] = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Check that a patch is whole, and that it fits a checkpoint.

    Exit 1 where it does not fit, 4 where it is damaged.
    """
    output = begin(json, quiet, verbose)
    from kpatch.patch.check import verify

    info = verify(patch, output)
    count = len(info.manifest.tensors)
    output.result({"id": info.id, "path": str(patch), "intact": True, "tensors": count})
    output.line(f"{patch}: intact, {counted(count, 'tensor')}, id {info.id[:12]}")
    if model_dir is None:
        return

    from kpatch.checkpoint.fit import verify_fit

    fit = verify_fit(patch, model_dir, output)
    weights = [{"name": weight.name, "fit": weight.how, "detail": weight.detail} for weight in fit.weights]
    output.result({"model": str(model_dir), "fits": fit.ok, "weights": weights})
    if verbose or not fit.ok:
        output.table(("Weight", "Fit", ""), [(weight.name, weight.how, weight.detail) for weight in fit.weights])
    if not fit.ok:
        raise fit.error(CheckFailed)
    for note in fit.notes:
        output.note(note)
    output.line(f"{patch}: fits {model_dir}")
