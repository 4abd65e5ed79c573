"""`kpatch probe`: what a model knows, by the rank of each fact's object among many."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kpatch.cli import options as opt
from kpatch.cli import parse
from kpatch.cli.output import Cell, Output, begin, percent
from kpatch.cli.targets import load
from kpatch.errors import BadInput
from kpatch.evaluate.with_without import without_and_with

if TYPE_CHECKING:
    from kpatch.evaluate.probe import Ranked
    from kpatch.facts.fact import Fact

EXAMPLES = opt.examples(
    "kpatch probe smollm2 known.yaml",
    "kpatch probe smollm2 news.yaml --patch news.patch --objects cities.txt --per-fact",
)
_RATES = ("p_at_1", "p_at_10", "p_at_100", "mrr")


def command(
    model: opt.Model,
    facts: opt.Facts,
    patch: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATCH", help="Try this patch in memory, beside the model without; can be repeated."),
    ] = None,
    objects: Annotated[
        str,
        typer.Option(
            metavar="all|relation|FILE",
            help="What targets are ranked among: those of all facts, those of the fact's relation, or the lines of a"
            " text file besides those of all facts.",
        ),
    ] = "all",
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="The first N facts only.")] = None,
    per_fact: Annotated[bool, typer.Option("--per-fact", help="Also show every fact's rank and best object.")] = False,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    modules: opt.Modules = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Ask a model what it knows.

    Each fact's target is ranked among all objects that come into question: P@1, P@10, P@100 and mean reciprocal rank,
    for every relation. With patches, before and after.
    """
    say = begin(json, quiet, verbose)
    started = time.monotonic()
    names = parse.modules(modules)

    from kpatch.facts.load import load_facts
    from kpatch.patch.header import read_header

    file = load_facts(facts, conflicts=True)
    for warning in file.warnings:
        say.warn(warning)
    chosen = file.facts[:limit]
    choices = _objects(file.facts, chosen, objects)
    for path in patch or ():
        read_header(path)
    loaded = load(say, model, device, dtype, names)

    from kpatch.evaluate.probe import by_relation, rank_objects, rates

    before, after, on = without_and_with(
        say, loaded, patch or [], lambda: rank_objects(loaded, chosen, choices, report=say)
    )
    found: dict[str, Any] = {
        "model": loaded.name,
        "patches": on,
        "objects": len({name for some in choices for name in some}),
        "all": rates(after),
        "relations": _listed(by_relation(chosen, after)),
        "unpatched": None
        if before is None
        else {"all": rates(before), "relations": _listed(by_relation(chosen, before))},
        "seconds": time.monotonic() - started,
    }
    rows = [_row(fact, one) for fact, one in zip(chosen, after, strict=True)]
    say.result({**found, "facts": rows} if per_fact else found)
    _show(say, found)
    if per_fact:
        say.line()
        table: list[list[Cell]] = [[row["text"], row["target"], row["rank"], row["best"]] for row in rows]
        say.table(("Prompt", "Target", "Rank", "Best"), table, right=(2,))


def _objects(every: Sequence[Fact], chosen: Sequence[Fact], given: str) -> list[tuple[str, ...]]:
    """The objects that each fact's target is ranked among."""
    if given == "relation":
        groups: dict[str | None, dict[str, None]] = {}
        for fact in every:
            groups.setdefault(fact.relation, {})[fact.target] = None
        named = {relation: tuple(targets) for relation, targets in groups.items()}
        return [named[fact.relation] for fact in chosen]
    names = dict.fromkeys(fact.target for fact in every)
    if given != "all":
        names |= dict.fromkeys(_lines(Path(given)))
    return [tuple(names)] * len(chosen)


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise BadInput("There is no such file", where=str(path), hint="--objects is all, relation or a file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput("The objects cannot be read", where=str(path), details=[str(error)]) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _listed(relations: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"relation": name, **numbers} for name, numbers in relations.items()]


def _row(fact: Fact, one: Ranked) -> dict[str, Any]:
    about = {"id": fact.id, "text": fact.text(), "target": fact.target, "relation": fact.relation}
    return {**about, **asdict(one)}


def _show(say: Output, found: Mapping[str, Any]) -> None:
    unpatched = found["unpatched"]
    before = {} if unpatched is None else {row["relation"]: row for row in unpatched["relations"]}
    rows: list[list[Cell]] = []
    for row in found["relations"]:
        rows.append([row["relation"], row["n"], *_cells(before.get(row["relation"]), row)])
    rows.append(["all", found["all"]["n"], *_cells(unpatched and unpatched["all"], found["all"])])
    say.table(("Relation", "n", "P@1", "P@10", "P@100", "MRR"), rows, right=(1, 2, 3, 4, 5))
    say.line(f"{found['model']}: ranks among {found['objects']:,} objects, {found['seconds']:.1f} s")


def _cells(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[str]:
    cells = []
    for name in _RATES:
        show = (lambda value: f"{value:.3f}") if name == "mrr" else percent
        cells.append(f"{show(before[name])} → {show(after[name])}" if before else show(after[name]))
    return cells
