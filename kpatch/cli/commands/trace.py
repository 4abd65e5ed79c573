"""`kpatch trace`: which states carry a fact, and from that which layers to edit."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kpatch import distributed
from kpatch.cli import options as opt
from kpatch.cli import parse
from kpatch.cli.heatmap import print_heatmap
from kpatch.cli.output import Cell, Output, begin, percent
from kpatch.cli.targets import open_model
from kpatch.errors import BadInput

if TYPE_CHECKING:
    from kpatch.facts.fact import Fact
    from kpatch.trace.summary import Summary

EXAMPLES = opt.examples(
    "kpatch trace smollm2 --quick -o trace/",
    'kpatch trace smollm2 --prompt "The {} is in" --subject "Space Needle"',
)


def command(
    model: opt.Model,
    facts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A fact file, or a known-facts file (JSON). Default: the built-in list."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Trace this one prompt, with {} where the subject goes.")
    ] = None,
    subject: Annotated[str | None, typer.Option(metavar="TEXT", help="The subject of --prompt.")] = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Trace at most N facts, drawn by the seed.")] = 100,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only what R needs: three curves at the last subject token, no grids.")
    ] = False,
    samples: Annotated[int, typer.Option(min=1, metavar="N", help="Samples of noise for each fact.")] = 10,
    noise: Annotated[
        float, typer.Option(metavar="X", help="Strength of the noise, in standard deviations of the embeddings.")
    ] = 3.0,
    window: Annotated[
        int, typer.Option(metavar="N", help="Layers whose MLP or attention outputs are restored together.")
    ] = 10,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="Write trace.json and pictures (PNG, SVG) there.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a report in one HTML file.")] = None,
    resume: opt.Resume = True,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="The same seed gives the same facts and noise.")] = 0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    exact: opt.Exact = False,
    max_memory: opt.MaxMemory = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="How much memory it may take besides the model, as in 2GB. Default: 1GB."),
    ] = None,
    modules: opt.Modules = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """See where a model keeps its facts, and find the layers R to edit."""
    output = begin(json, quiet, verbose)
    one = _one_prompt(prompt, subject, facts)
    budget, names = parse.memory(memory), parse.modules(modules)
    _check_outputs(output, out, html)
    given = _facts(output, facts)
    loaded = open_model(output, model, device, parse.dtype(dtype, exact), names, parse.max_memory(max_memory))

    from kpatch.trace.files import write_folder, write_html
    from kpatch.trace.run import TraceSettings, trace
    from kpatch.trace.summary import Summary

    traces = trace(
        loaded,
        given,
        prompt=one,
        limit=limit,
        settings=TraceSettings(samples, noise, window, seed, quick),
        budget=budget,
        resume=resume,
        report=output,
    )
    if not distributed.is_main():
        return
    summary = Summary(traces)
    with output.task("Writing pictures and reports"):
        files = [] if out is None else write_folder(summary, out)
        files += [] if html is None else [write_html(summary, html)]
    output.result({**summary.to_dict(), "files": [str(path) for path in files]})
    _print_summary(output, summary)
    for path in files:
        output.note(f"wrote {path}")
    _note_next(output, summary, out)


def _one_prompt(prompt: str | None, subject: str | None, facts: Path | None) -> tuple[str, str] | None:
    if prompt is None and subject is None:
        return None
    if prompt is None or subject is None:
        missing = "prompt" if prompt is None else "subject"
        raise BadInput(f"`{missing}` is missing", hint='as in `prompt="The {} is in"` `subject="Space Needle"`')
    if facts is not None:
        raise BadInput("`prompt` and `facts` exclude each other", hint="leave one of them out")
    from kpatch.trace.fact_lists import slotted

    return slotted(prompt, subject), subject


def _facts(output: Output, path: Path | None) -> Sequence[Fact] | None:
    if path is None:
        return None
    from kpatch.trace.fact_lists import read_facts

    file = read_facts(path)
    for warning in file.warnings:
        output.warn(warning)
    return file.facts


def _check_outputs(output: Output, out: Path | None, html: Path | None) -> None:
    """Refuse before hours of work what would be refused after them."""
    if out is not None:
        if out.exists() and not out.is_dir():
            raise BadInput(f"{out} is a file", hint="give `out` the name of a directory")
        if find_spec("matplotlib") is None:
            output.warn("no pictures: they need matplotlib (pip install 'kpatch[plot]'); trace.json is written")
    if html is not None:
        if html.is_dir():
            raise BadInput(f"{html} is a directory", hint="give `html` the name of a file")
        if not html.parent.is_dir():
            raise BadInput(f"There is no directory {html.parent}", where=str(html), hint="make it first")


def _print_summary(output: Output, summary: Summary) -> None:
    """The heatmaps, then what they come to."""
    from kpatch.trace.panels import curves_panel, describe_range, panels

    for panel in (*panels(summary), curves_panel(summary)):
        print_heatmap(output, panel)
        output.line()
    traces = summary.traces
    _print_peaks(output, summary)
    if len(traces.facts) == 1:
        fact = traces.facts[0]
        output.line(f"{fact.fact.text()} → {fact.answer}")
    else:
        output.line(f"{len(traces.facts):,} facts that {traces.model} knows, of {traces.tried:,} tried")
    clean, corrupted, total = (float(part.mean) for part in (summary.clean, summary.corrupted, summary.total_effect))
    low, high = float(summary.total_effect.low), float(summary.total_effect.high)
    between = f" (95 %: {low:.3f} to {high:.3f})" if low == low else ""
    output.line(f"P(answer) {clean:.3f} clean, {corrupted:.3f} corrupted; total effect {total:.3f}{between}")
    output.line(describe_range(summary))


def _print_peaks(output: Output, summary: Summary) -> None:
    """Where each kind of restoring has its largest effect: a table of the heatmaps' peaks, by role."""
    from kpatch.trace.cells import KINDS
    from kpatch.trace.summary import ROLES

    if len(summary.traces.facts) == 1 or not summary.effects:
        return
    rows: list[list[Cell]] = []
    for role, count in enumerate(summary.role_counts):
        if not count:
            continue
        row: list[Cell] = [ROLES[role], count]
        for kind in KINDS:
            found = summary.effects[kind]
            layer = int(found.mean[role].argmax())
            low, high = float(found.low[role, layer]), float(found.high[role, layer])
            between = f" ({_points(low)} to {_points(high)})" if low == low else ""
            row += [f"{percent(float(found.mean[role, layer]))}{between}", layer]
        rows.append(row)
    output.table(
        ("Largest effect (95 %)", "Facts", "State", "Layer", "MLP window", "Layer", "Attention window", "Layer"),
        rows,
        right=(1, 3, 5, 7),
    )
    output.line()


def _points(value: float) -> str:
    """A share in percent, never -0.0."""
    return f"{round(100 * value, 1) + 0.0:.1f}"


def _note_next(output: Output, summary: Summary, out: Path | None) -> None:
    found = summary.range
    if found is None or len(summary.traces.facts) < 2:
        return
    layers = f"--layers {found.first}-{found.last}" if out is None else f"--layers-from {out / 'trace.json'}"
    output.note(f"next: kpatch make facts.yaml {layers}")
