"""`kpatch make`: facts in, a patch out, with its effect measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kpatch import distributed
from kpatch.cli import options as opt
from kpatch.cli import parse
from kpatch.cli.forecast import print_forecast
from kpatch.cli.gates import rates_of, shortfalls
from kpatch.cli.output import begin
from kpatch.cli.tables import print_made
from kpatch.errors import BadInput, CheckFailed
from kpatch.outputs import check_new_file

EXAMPLES = opt.examples(
    "kpatch make facts.yaml -o news.patch --model smollm2",
    "kpatch make facts.yaml --method memit-paper --layers 4-8 --min-efficacy 0.9",
)

_Least = typer.Option(min=0.0, max=1.0, metavar="RATE", help="Exit 1 below this rate, from 0 to 1.")


def command(
    facts: opt.Facts,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="PATCH", help="The file to write. Default: FACTS with suffix .patch, here."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Alias, hub id, directory or GGUF file. Default: the file's `model:`."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="memit|memit-paper|rome|ft|alphaedit|blue|mend",
            help="How the weights are found; other packages can add methods. Default: the preset file's, else memit.",
        ),
    ] = None,
    preset: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Settings from a preset file, as `kpatch tune` writes them."),
    ] = None,
    editor: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The trained editor that mend needs, as `kpatch train mend` writes it."),
    ] = None,
    wordings: Annotated[
        str | None,
        typer.Option(
            metavar="none|given|auto",
            help="Other words that facts are learned in: none, the file's, or also kpatch's own for known relations"
            " (auto). Default: the preset file's, else auto.",
        ),
    ] = None,
    layers: opt.Layers = None,
    layers_from: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Take them from the trace.json of `kpatch trace -o`.")
    ] = None,
    corpus: opt.Corpus = "self",
    tokens: opt.Tokens = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A hyperparameter; can be repeated.")
    ] = None,
    on: Annotated[
        Path | None,
        typer.Option(metavar="MODEL_DIR", help="Make it for this checkpoint, which already carries patches."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--afresh", help="Use what an interrupted run left in the cache.")
    ] = True,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what memory, disk and time it will take, and do nothing.")
    ] = False,
    min_efficacy: Annotated[float | None, _Least] = None,
    min_generalization: Annotated[float | None, _Least] = None,
    min_specificity: Annotated[float | None, _Least] = None,
    min_retention: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, metavar="RATE", help="With --on: exit 1 where fewer of the earlier facts still hold."
        ),
    ] = None,
    force: opt.Force = False,
    seed: opt.Seed = 0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    exact: opt.Exact = False,
    max_memory: opt.MaxMemory = None,
    memory: opt.Memory = None,
    modules: opt.Modules = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Make a patch from a fact file, and measure what it does."""
    say = begin(json, quiet, verbose)
    path = check_new_file(out or facts.with_suffix(".patch").name, force=force or plan, what="a patch")
    chosen, settings = parse.layers(layers), parse.settings(set_ or [])
    budget, names, limits = parse.memory(memory), parse.modules(modules), parse.max_memory(max_memory)
    if min_retention is not None and on is None:
        raise BadInput("`min_retention` needs a checkpoint that carries patches", hint="name it: --on MODEL_DIR")
    least = {"efficacy": min_efficacy, "generalization": min_generalization, "specificity": min_specificity}

    from kpatch.facts.load import load_facts

    file = load_facts(facts)
    for warning in file.warnings:
        say.warn(warning)

    given: dict[str, Any] = {
        **{"layers_from": layers_from, "on": on, "max_memory": limits},
        **{"model": model, "method": method, "preset": preset, "layers": chosen, "wordings": wordings},
        **{"corpus": corpus, "tokens": tokens, "settings": settings, "seed": seed, "device": device},
        **{"dtype": parse.dtype(dtype, exact), "memory": budget, "modules": names, "report": say},
    }
    if plan:
        if editor is not None:
            raise BadInput("`plan` takes no `editor`", hint="leave it out")
        from kpatch.edit.forecast import forecast

        print_forecast(say, forecast(file, **given))
        return

    from kpatch.edit.make import make

    result = make(file, out=path, resume=resume, force=force, editor=editor, **given)
    if not distributed.is_main():
        return
    print_made(say, result)
    rates = rates_of(result.effect["after"])
    rates["retention"] = None if result.retention is None else result.retention.rate
    if min_retention is not None and rates["retention"] is None:
        say.note("no earlier fact held before, so that none could be lost")
        min_retention = None
    _check_rates(rates, {**least, "retention": min_retention}, result.method)


def _check_rates(rates: dict[str, float | None], least: dict[str, float | None], method: str) -> None:
    short = shortfalls(rates, least)
    if short:
        raise CheckFailed(
            "The patch was made, but falls short of what was asked",
            details=short,
            hint="give the facts `wordings`, or a larger --set leverage=…"
            if method == "memit"
            else "try --method memit",
        )
