"""`kpatch models`: what can stand where a command wants a model."""

from __future__ import annotations

from typing import Annotated

import typer

from kpatch.cli import options as opt
from kpatch.cli.output import Cell, Output, begin

EXAMPLES = opt.examples("kpatch models smollm2", "kpatch models --json | jq '.aliases[].name'")


def command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="Get this one (download, convert) and say where it lies. Default: list them all."
        ),
    ] = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """List known aliases, families and presets, or find one model."""
    output = begin(json, quiet, verbose)
    if model is None:
        _list(output)
    else:
        _find(output, model)


def _find(output: Output, model: str) -> None:
    from kpatch.models.address import resolve

    found = resolve(model, output)
    fields = {"address": model, "name": found.name, "kind": found.kind, "revision": found.revision}
    output.result({**fields, "path": str(found.path)})
    output.note(found.said)
    output.line(str(found.path))


def _list(output: Output) -> None:
    from kpatch.edit.methods import all_presets
    from kpatch.edit.presets import PRESETS
    from kpatch.models.aliases import ALIASES
    from kpatch.models.families import FAMILIES

    aliases = [
        {
            "name": alias.name,
            "source": str(alias.source),
            "family": alias.family,
            "parameters": alias.parameters,
            "preset": alias.name in PRESETS["memit-paper"],
        }
        for alias in ALIASES.values()
    ]
    presets = all_presets()
    output.result({"aliases": aliases, "families": list(FAMILIES), "presets": presets})
    rows: list[list[Cell]] = []
    for alias in ALIASES.values():
        known = "yes" if alias.name in PRESETS["memit-paper"] else ""
        rows.append([alias.name, str(alias.source), alias.family, alias.parameters, known])
    output.table(("Alias", "Model", "Family", "Size", "Preset"), rows, right=(3,))
    output.line(f"\nFamilies: {', '.join(FAMILIES)}")
    output.line(
        "Any hub id (owner/name, with @revision if you like), checkpoint directory or GGUF file of these works.\n"
    )
    rows = []
    for preset in presets:
        ends = sorted({min(preset["layers"]), max(preset["layers"])})
        rows.append([preset["name"], preset["method"], "–".join(map(str, ends)), preset["source"]])
    output.table(("Preset", "Method", "Layers", "Where its numbers come from"), rows)
