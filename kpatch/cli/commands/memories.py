"""`kpatch memories`: feed-forward layers as key-value memories."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kpatch.cli import options as opt
from kpatch.cli import parse
from kpatch.cli.output import Output, begin, percent
from kpatch.cli.targets import open_model
from kpatch.errors import BadInput

if TYPE_CHECKING:
    from kpatch.memories.run import Side, UnitMemory
    from kpatch.memories.summary import Summary

EXAMPLES = opt.examples(
    "kpatch memories smollm2 --plot memories/",
    "kpatch memories smollm2 --units 12.345,20.700 --corpus wiki.txt --tokens 100000",
)
_TRIGGERS, _PROMOTES = 5, 8


def command(
    model: opt.Model,
    units: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Look at these units: layer.number, as in 12.345,20.700."),
    ] = None,
    sample: Annotated[
        int, typer.Option(min=0, metavar="N", help="Else at N units of each layer, drawn by seed.")
    ] = 10,
    layers: Annotated[str | None, typer.Option(metavar="LAYERS", help="As in 4-8. Default: all layers.")] = None,
    corpus: Annotated[
        str,
        typer.Option(
            metavar="self|PATH|NAME",
            help="Text to read: self (sampled from the model), a text, JSON Lines or parquet file, or a hub dataset.",
        ),
    ] = "self",
    tokens: opt.Tokens = None,
    inputs: Annotated[
        int, typer.Option(min=1, metavar="N", help="Prefixes at which predictions are looked at.")
    ] = 400,
    removals: Annotated[
        int, typer.Option(min=0, metavar="N", help="Triggers of each unit that lose a token to see what it did.")
    ] = 2,
    plot: Annotated[Path | None, typer.Option(metavar="DIR", help="Write pictures (PNG, SVG) there.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a report in one HTML file.")] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="The same seed gives the same text and units.")] = 0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    max_memory: opt.MaxMemory = None,
    modules: opt.Modules = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """See what triggers the units of a model's MLPs, and what they say."""
    output = begin(json, quiet, verbose)
    wanted, names = parse.layers(layers), parse.modules(modules)
    named = None if units is None else units.split(",")
    if named is not None:
        from kpatch.memories.units import parse_units

        parse_units(named)  # a wrong name fails before a model is loaded
    _check_outputs(plot, html)
    loaded = open_model(output, model, device, dtype, names, parse.max_memory(max_memory))

    from kpatch.memories.html import write_html
    from kpatch.memories.plot import draw
    from kpatch.memories.run import find_memories
    from kpatch.memories.summary import Summary

    found = find_memories(
        loaded,
        units=named,
        sample=sample,
        layers=wanted,
        corpus=corpus,
        tokens=tokens,
        inputs=inputs,
        removals=removals,
        seed=seed,
        report=output,
    )
    summary = Summary(found)
    files = [] if plot is None else draw(summary, plot)
    files += [] if html is None else [write_html(summary, html)]
    output.result({**summary.to_dict(), "files": [str(path) for path in files]})
    _print(output, summary)
    for path in files:
        output.note(f"wrote {path}")


def _check_outputs(plot: Path | None, html: Path | None) -> None:
    """Refuse before the work what would be refused after it."""
    if plot is not None:
        if plot.exists() and not plot.is_dir():
            raise BadInput(f"{plot} is a file", hint="give `plot` the name of a directory")
        if find_spec("matplotlib") is None:
            raise BadInput("Pictures need matplotlib", hint="pip install 'kpatch[plot]'")
    if html is not None:
        if html.is_dir():
            raise BadInput(f"{html} is a directory", hint="give `html` the name of a file")
        if not html.absolute().parent.is_dir():
            raise BadInput(f"There is no directory {html.parent}", where=str(html), hint="make it first")


def _print(output: Output, summary: Summary) -> None:
    memories = summary.memories
    _print_layers(output, summary)
    if memories.named:
        for unit in memories.units:
            _print_unit(output, unit)
    else:
        _print_sample(output, memories.units, whole=output.verbose)
    agree, of = summary.certain
    output.line(f"{memories.model}: {memories.tokens:,} tokens of {memories.corpus}, in rows of {memories.row}")
    output.line(f"Of the {of} values that promote a token most surely, {agree} have it behind a trigger.")


def _print_layers(output: Output, summary: Summary) -> None:
    output.table(
        ("Layer", "Agreement", "By chance", "Rank", "Same last", "− first", "− last", "− other", "Active", "m > 0"),
        [
            (
                one.layer,
                percent(one.agreement),
                f"{100 * one.chance:.2f} %",
                None if one.rank is None else f"{one.rank[1]:,.0f}",
                percent(one.same_last),
                *(_change(one.removal[which]) for which in ("first", "last", "other")),
                percent(one.active),
                percent(one.positive),
            )
            for one in summary.layers
        ],
        right=range(10),
    )
    output.line()
    output.table(
        ("Layer", "No single memory's", "Residual agrees", "P", "Residual's", "Both", "MLP's", "Neither's"),
        [
            (one.layer, *map(percent, (one.composed, one.residual, one.residual_chance, *one.kinds.values())))
            for one in summary.layers
        ],
        right=range(8),
    )
    output.line()


def _change(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.0f} %"


def _print_sample(output: Output, units: tuple[UnitMemory, ...], whole: bool) -> None:
    """A line a unit: its strongest trigger and what that side promotes; one unit a layer, unless `whole`."""
    from kpatch.memories.words import ending, listed, shown

    rows, layers = [], set()
    for unit in units:
        if unit.sides and (whole or unit.unit.layer not in layers):
            layers.add(unit.unit.layer)
            side = unit.sides[0]
            first = side.triggers[0]
            rows.append(
                (
                    str(unit.unit),
                    f"{first.coefficient:.3g}",
                    ending(first.text, 40),
                    shown(first.following),
                    listed(side.promotes, 5),
                )
            )
    output.table(("Unit", "m", "Strongest trigger", "Next", "Promotes"), rows, right=(1,))
    if not whole and len(rows) < len(units):
        output.line(f"… and {len(units) - len(rows):,} more units (-v shows all)")
    output.line()


def _print_unit(output: Output, unit: UnitMemory) -> None:
    if not unit.sides:
        output.line(f"{unit.unit}: nothing triggers it in this text")
        output.line()
    for side in unit.sides:
        _print_side(output, unit, side)


def _print_side(output: Output, unit: UnitMemory, side: Side) -> None:
    from kpatch.memories.words import ending, listed, shown

    sign = "v" if side.sign > 0 else "−v"
    output.line(f"{unit.unit}  {sign} promotes {listed(side.promotes, _PROMOTES)}")
    if side.rank is not None:
        output.line(f"The token behind its strongest trigger has rank {side.rank:,} there.")
    rows = [
        (
            f"{trigger.coefficient:.3g}",
            f"{trigger.before:.3g}",
            *(
                _change(trigger.removal.change(which) if trigger.removal else None)
                for which in ("first", "last", "other")
            ),
            ending(trigger.text, 60),
            shown(trigger.following),
        )
        for trigger in side.triggers[: None if output.verbose else _TRIGGERS]
    ]
    output.table(("m", "One earlier", "− first", "− last", "− other", "Trigger", "Next"), rows, right=(0, 1, 2, 3, 4))
    output.line()
