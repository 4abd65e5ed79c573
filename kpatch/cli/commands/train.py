"""`kpatch train`: an editor trained for a model, as a file that `make` takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kpatch.cli import options as opt
from kpatch.cli import parse
from kpatch.cli.output import Cell, Output, begin
from kpatch.cli.targets import open_model
from kpatch.errors import BadInput
from kpatch.outputs import check_new_file

if TYPE_CHECKING:
    from kpatch.mend.train import Trained

EXAMPLES = opt.examples(
    "kpatch train mend smollm2 counterfact.json -o mend.safetensors --minutes 60",
    "kpatch train mend smollm2 zsre.jsonl -o malmen.safetensors --set regression=1 --set edits=10",
)


def command(
    method: Annotated[str, typer.Argument(metavar="mend", help="The method to train an editor for.")],
    model: opt.Model,
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA", help="Facts to learn editing from: a data set that import reads, or a fact file."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="The editor to write, a safetensors file.")],
    layers: Annotated[
        str | None,
        typer.Option(metavar="LAYERS", help="The layers to edit: 27-29, or 27,28,29. Default: the last three."),
    ] = None,
    limit: opt.FirstFacts = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.0, metavar="N", help="End after so long, if it has not ended by itself.")
    ] = None,
    corpus: Annotated[
        str,
        typer.Option(
            metavar="self|PATH|NAME",
            help="Text that must stay as it is: self (sampled from the model), or as for cov.",
        ),
    ] = "self",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A number of the training; can be repeated.")
    ] = None,
    resume: opt.Resume = True,
    force: opt.Force = False,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="The same seed gives the same editor.")] = 0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    max_memory: opt.MaxMemory = None,
    memory: opt.Memory = None,
    modules: opt.Modules = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Train an editor for a model, for make --method mend."""
    output = begin(json, quiet, verbose)
    if method != "mend":
        raise BadInput(f"No editor can be trained for the method {method!r}", details=["expected mend"])
    path = check_new_file(out, force=force, what="an editor")
    chosen, settings = parse.layers(layers), parse.settings(set_ or [])
    budget, names = parse.memory(memory), parse.modules(modules)

    from kpatch.facts.importers.read import import_facts

    facts = import_facts(data, drop_conflicts=True).facts[:limit]

    from kpatch.edit.methods import with_settings
    from kpatch.mend.settings import TrainHyper

    hyper = with_settings(TrainHyper(), settings)
    hyper.require()
    loaded = open_model(output, model, device, dtype, names, parse.max_memory(max_memory))

    from kpatch.mend.editor import train_editor

    made = train_editor(
        loaded,
        facts,
        path,
        settings=hyper,
        layers=chosen,
        corpus=corpus,
        minutes=minutes,
        seed=seed,
        memory=budget,
        resume=resume,
        force=force,
        report=output,
    )
    output.result({"model": loaded.name, **made.to_dict()})
    _print(output, made.trained)
    output.line(f"{path}  {made.trained.steps:,} steps, {made.trained.ended}")
    output.note(f"next: kpatch make FACTS --model {model} --method mend --editor {path}")


def _print(output: Output, trained: Trained) -> None:
    """Every validation; the lowest loss is the editor that was written."""
    lowest = min(row["loss"] for row in trained.history)
    rows: list[list[Cell]] = []
    for row in trained.history:
        numbers = [f"{row[name]:.4f}" for name in ("loss", "edit", "near", "text")]
        rows.append([f"{int(row['step']):,}", *numbers, "written" if row["loss"] == lowest else ""])
    output.table(("Step", "Loss", "−log P", "KL near", "KL text", ""), rows, right=(0, 1, 2, 3, 4))
