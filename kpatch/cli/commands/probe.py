"""`kpatch probe`: what a model knows, by the rank of each fact's object among many, or by its answers to questions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kpatch.cli import options as opt
from kpatch.cli import parse
from kpatch.cli.closed_book import Asking, probe_answers
from kpatch.cli.output import Cell, Output, begin, percent
from kpatch.cli.targets import check_patches, facts_and_model, open_facts, open_model
from kpatch.errors import BadInput
from kpatch.evaluate.with_without import without_and_with
from kpatch.text import counted

if TYPE_CHECKING:
    from kpatch.evaluate.probe import Ranked
    from kpatch.facts.fact import Fact
    from kpatch.models.model import Model

EXAMPLES = opt.examples(
    "kpatch probe news.yaml smollm2 --patch news.patch --objects cities.txt --per-fact",
    "kpatch probe questions.jsonl smollm2 --answers",
)
_VOCABULARY = "vocabulary"
_LAMA = ("p_at_1", "p_at_10")
_RATES = ("p_at_1", "p_at_10", "p_at_100", "mrr")


def command(
    facts: Annotated[
        str,
        typer.Argument(
            metavar="FACTS",
            help="A fact file. With --answers a question file: JSON Lines of question and answers, zsRE,"
            " HalluEditBench, or facts with questions.",
        ),
    ],
    model: opt.Model,
    patch: opt.Patches = None,
    answers: Annotated[
        bool,
        typer.Option(
            "--answers",
            help="Let the model answer questions by itself, and count exact matches with accepted answers.",
        ),
    ] = False,
    form: Annotated[
        str | None,
        typer.Option(
            metavar="chat|completion",
            help="How --answers puts a question: in the model's chat template or as plain text. Default: chat where"
            " there is a template.",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, max=100_000, metavar="N", help="Bootstrap samples for the intervals of --answers.")
    ] = 2000,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the bootstrap samples.")] = 0,
    objects: Annotated[
        str | None,
        typer.Option(
            "--objects",
            metavar="all|relation|vocabulary|FILE",
            help="What targets are ranked among: those of all facts (the default), those of the fact's relation, the"
            " model's whole vocabulary (targets of one token alone, as in LAMA), or the lines of a text file besides"
            " those of all facts.",
        ),
    ] = None,
    limit: opt.FirstFacts = None,
    per_fact: Annotated[
        bool, typer.Option("--per-fact", help="Also show every fact's rank and best object, or every answer.")
    ] = False,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    max_memory: opt.MaxMemory = None,
    modules: opt.Modules = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Ask a model what it knows.

    Each fact's target is ranked among all objects that come into question: P@1, P@10, P@100 and mean reciprocal rank,
    for every relation. With --answers the model answers questions instead: exact match and recall. With patches,
    before and after.
    """
    output = begin(json, quiet, verbose)
    started = time.monotonic()
    names = parse.modules(modules)
    if answers:
        if objects is not None:
            raise BadInput("`objects` are for ranks, and `answers` ranks nothing", hint="leave one of the two out")
        probe_answers(
            output,
            facts,
            model,
            patch or (),
            Asking(form, limit, per_fact, samples, seed),
            (device, dtype, names, parse.max_memory(max_memory)),
        )
        return
    if form is not None:
        raise BadInput("`form` needs `answers`")
    path, address = facts_and_model(facts, model)
    file = open_facts(output, path, conflicts=True)
    chosen = file.facts[:limit]
    whole = objects == _VOCABULARY
    choices = [] if whole else _objects(file.facts, chosen, objects or "all")
    check_patches(patch or ())
    loaded = open_model(output, address, device, dtype, names, parse.max_memory(max_memory))
    if whole:
        chosen = _single_tokens(output, loaded, chosen)

    def ask() -> tuple[list[Ranked], dict[str, Any] | None]:
        """All ranks, and LAMA's table."""
        from kpatch.evaluate.lama import lama, ranks_without_siblings, siblings
        from kpatch.evaluate.probe import rank_objects
        from kpatch.evaluate.vocabulary import rank_in_vocabulary

        if whole:
            aside = siblings(file.facts, chosen)
            plain = rank_in_vocabulary(loaded, chosen, report=output)
            return plain, lama(chosen, rank_in_vocabulary(loaded, chosen, aside) if any(aside) else plain)
        ranks = rank_objects(loaded, chosen, choices, report=output)
        return ranks, lama(chosen, ranks_without_siblings(loaded, file.facts, chosen, choices, ranks, output))

    before, after, on = without_and_with(output, loaded, patch or [], ask)
    found: dict[str, Any] = {
        "model": loaded.name,
        "patches": on,
        "objects": _vocabulary(loaded) if whole else len({name for some in choices for name in some}),
        **_as_json(chosen, *after),
        "unpatched": None if before is None else _as_json(chosen, *before),
        "seconds": time.monotonic() - started,
    }
    rows = [_row(fact, one) for fact, one in zip(chosen, after[0], strict=True)]
    output.result({**found, "facts": rows} if per_fact else found)
    _print_rates(output, found)
    _print_lama(output, found)
    if per_fact:
        output.line()
        table: list[list[Cell]] = [[row["text"], row["target"], row["rank"], row["best"]] for row in rows]
        output.table(("Prompt", "Target", "Rank", "Best"), table, right=(2,))


def _single_tokens(output: Output, model: Model, facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """The facts whose target is one token. Raises BadInput where there is none."""
    from kpatch.evaluate.vocabulary import in_vocabulary

    found = tuple(in_vocabulary(model, facts))
    if not found:
        raise BadInput(
            "No target is one token, and a vocabulary has nothing longer",
            hint="rank among `objects=all` or `relation`",
        )
    if len(found) < len(facts):
        output.warn(f"{counted(len(facts) - len(found), 'fact')} with a target of several tokens left out")
    return found


def _vocabulary(model: Model) -> int:
    from kpatch.evaluate.forward import vocabulary

    return vocabulary(model)


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
        raise BadInput(
            "There is no such file", where=str(path), hint="`objects` is all, relation, vocabulary or a file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput("The objects cannot be read", where=str(path), details=[str(error)]) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _as_json(facts: Sequence[Fact], ranks: Sequence[Ranked], table: dict[str, Any] | None) -> dict[str, Any]:
    """The rates of all facts, and of each relation; and LAMA's table."""
    from kpatch.evaluate.probe import by_relation, rates

    relations = [{"relation": name, **numbers} for name, numbers in by_relation(facts, ranks).items()]
    return {"all": rates(ranks), "relations": relations, "lama": table}


def _row(fact: Fact, one: Ranked) -> dict[str, Any]:
    about = {"id": fact.id, "text": fact.text(), "target": fact.target, "relation": fact.relation}
    return {**about, **asdict(one)}


def _print_rates(output: Output, found: Mapping[str, Any]) -> None:
    unpatched = found["unpatched"]
    before = {} if unpatched is None else {row["relation"]: row for row in unpatched["relations"]}
    rows: list[list[Cell]] = []
    for row in found["relations"]:
        rows.append([row["relation"], row["n"], *_cells(before.get(row["relation"]), row)])
    rows.append(["all", found["all"]["n"], *_cells(unpatched and unpatched["all"], found["all"])])
    output.table(("Relation", "n", "P@1", "P@10", "P@100", "MRR"), rows, right=(1, 2, 3, 4, 5))
    output.line(f"{found['model']}: ranks among {found['objects']:,} objects, {found['seconds']:.1f} s")


def _print_lama(output: Output, found: Mapping[str, Any]) -> None:
    """LAMA's table: means over the relations of each kind that there is, and over all."""
    table, unpatched = found["lama"], found["unpatched"]
    if table is None:
        return
    rows: list[list[Cell]] = []
    for place, row in enumerate(table["totals"]):
        if row["relations"]:
            old = None if unpatched is None else unpatched["lama"]["totals"][place]
            cells = [
                percent(row[name]) if old is None else f"{percent(old[name])} → {percent(row[name])}" for name in _LAMA
            ]
            rows.append([row["kind"], row["facts"], row["relations"], percent(row["frequency"]), *cells])
    output.line()
    output.table(("Relations", "Facts", "Number", "Most frequent", "P@1", "P@10"), rows, right=(1, 2, 3, 4, 5))
    output.line(
        "means over relations, as in LAMA; most frequent: P@1 of always saying the relation's commonest object"
    )


def _cells(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[str]:
    cells = []
    for name in _RATES:
        show = (lambda value: f"{value:.3f}") if name == "mrr" else percent
        cells.append(f"{show(before[name])} → {show(after[name])}" if before else show(after[name]))
    return cells
