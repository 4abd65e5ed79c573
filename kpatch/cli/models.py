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
    out = begin(json, quiet, verbose)
    if model is None:
        _list(out)
    else:
        _find(out, model)


def _find(out: Output, model: str) -> None:
    from kpatch.models.address import resolve

    found = resolve(model, out)
    fields = {"address": model, "name": found.name, "kind": found.kind, "revision": found.revision}
    out.result({**fields, "path": str(found.path)})
    out.note(found.said)
    out.line(str(found.path))


def _list(out: Output) -> None:
    from kpatch.edit.hyper import PRESETS
    from kpatch.models.aliases import ALIASES
    from kpatch.models.families import FAMILIES

    aliases = [
        {
            "name": alias.name,
            "source": str(alias.source),
            "family": alias.family,
            "parameters": alias.parameters,
            "preset": alias.name in PRESETS,
        }
        for alias in ALIASES.values()
    ]
    presets = [
        {"name": name, "layers": list(preset.hyper.layers), **preset.hyper.to_dict(), "source": preset.source}
        for name, preset in PRESETS.items()
    ]
    out.result({"aliases": aliases, "families": list(FAMILIES), "presets": presets})
    rows: list[list[Cell]] = []
    for alias in ALIASES.values():
        rows.append([alias.name, str(alias.source), alias.family, alias.parameters, "yes" * (alias.name in PRESETS)])
    out.table(("Alias", "Model", "Family", "Size", "Preset"), rows, right=(3,))
    out.line(f"\nFamilies: {', '.join(FAMILIES)}")
    out.line(
        "Any hub id (owner/name, with @revision if you like), checkpoint directory or GGUF file of these works.\n"
    )
    rows = [[name, f"{min(p.hyper.layers)}–{max(p.hyper.layers)}", p.source] for name, p in PRESETS.items()]
    out.table(("Preset", "Layers", "Where its numbers come from"), rows)
