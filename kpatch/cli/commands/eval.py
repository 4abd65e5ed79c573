"""`kpatch eval`: what a model makes of facts, with patches and without; a gate where thresholds are given."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kpatch.cli import options as opt
from kpatch.cli import parse
from kpatch.cli.output import begin, percent
from kpatch.cli.tables import rate
from kpatch.cli.targets import load
from kpatch.errors import BadInput, CheckFailed
from kpatch.evaluate.with_without import without_and_with
from kpatch.outputs import check_new_file

if TYPE_CHECKING:
    from kpatch.facts.fact import Fact
    from kpatch.models.model import Model

EXAMPLES = opt.examples(
    "kpatch eval facts.yaml smollm2 --patch news.patch --min-efficacy 0.95 --min-specificity 0.7",
    "kpatch eval facts.yaml model/ --generate --text wiki.txt --html report.html",
)

_Share = typer.Option(min=0.0, max=1.0, metavar="RATE", help="Exit 1 below this rate, from 0 to 1.")


def command(
    facts: opt.Facts,
    model: opt.Model,
    patch: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATCH", help="Try this patch in memory, beside the model without; can be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="The first N facts only.")] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Let the model write: fluency, consistency, free-running paraphrases.")
    ] = False,
    length: Annotated[
        int, typer.Option(min=8, max=4096, metavar="N", help="Tokens of a text it writes, the prompt counted.")
    ] = 100,
    references: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="For consistency: a .txt, .jsonl or .parquet file whose paragraphs about the targets are references."
            " Default: the facts' own.",
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="PATH", help="Also take the perplexity of this text, before and after.")
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=2, metavar="N", help="How much of the text to read.")] = 8192,
    min_efficacy: Annotated[float | None, _Share] = None,
    min_generalization: Annotated[float | None, _Share] = None,
    min_specificity: Annotated[float | None, _Share] = None,
    min_score: Annotated[float | None, _Share] = None,
    min_free_running: Annotated[float | None, _Share] = None,
    min_fluency: Annotated[
        float | None, typer.Option(min=0.0, metavar="BITS", help="Exit 1 below this; needs --generate.")
    ] = None,
    min_consistency: Annotated[float | None, _Share] = None,
    max_perplexity_drift: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Exit 1 where the text's perplexity rises by more: 0.05 is 5 %."),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, max=100_000, metavar="N", help="Bootstrap samples for the intervals.")
    ] = 2000,
    per_fact: Annotated[
        bool, typer.Option("--per-fact", help="List the facts that failed; with --json all of them.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write one self-contained page with tables and plots.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over an existing --html file.")] = False,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Decides what is drawn: texts and samples.")] = 0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    modules: opt.Modules = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Measure what a model makes of facts.

    Efficacy, generalization and specificity with 95 % intervals; beside them the model without its patches: those of
    --patch, or those that MODEL carries. Thresholds make it a gate.
    """
    say = begin(json, quiet, verbose)
    started = time.monotonic()
    least = {
        "efficacy": min_efficacy,
        "generalization": min_generalization,
        "specificity": min_specificity,
        "score": min_score,
        "free_running": min_free_running,
        "fluency": min_fluency,
        "consistency": min_consistency,
    }
    _check_options(least, max_perplexity_drift, generate, text, html, force)
    names = parse.modules(modules)

    from kpatch.facts.load import load_facts
    from kpatch.patch.header import read_header

    file = load_facts(facts, conflicts=True)
    for warning in file.warnings:
        say.warn(warning)
    chosen = file.facts[:limit]
    for path in patch or ():
        read_header(path)  # a wrong file is told before a model is loaded
    loaded = load(say, model, device, dtype, names)

    from kpatch.evaluate.assess import Wanted, assess, drift

    wanted = Wanted(
        generate=generate,
        tokens=length,
        references=_references(chosen, references) if generate else (),
        text=_text(loaded, text, text_tokens),
        samples=samples,
        seed=seed,
    )
    before, after, on = without_and_with(say, loaded, patch or [], lambda: assess(loaded, chosen, wanted, say))
    read = {"before": None if before is None else before.perplexity, "after": after.perplexity}
    found: dict[str, Any] = {
        "model": loaded.name,
        "patches": on,
        "evaluated": len(chosen),
        "metrics": after.metrics,
        "unpatched": None if before is None else {**before.metrics, **before.writing},
        "fluency": None,
        "consistency": None,
        **after.writing,
        "perplexity": {**read, "drift": drift(read["before"], read["after"])} if text else None,
        "seconds": time.monotonic() - started,
    }
    say.result({**found, "facts": list(after.facts)} if per_fact else found)
    from kpatch.cli.tables import show

    unpatched = () if before is None else before.facts
    show(say, found, after.facts if per_fact else (), unpatched)
    if html is not None:
        from kpatch.cli.html import write_page

        write_page(html, facts.name, found, after.facts, unpatched)
        say.note(f"{html} written")
    _gate(found, least, max_perplexity_drift)


def _check_options(
    least: dict[str, float | None],
    most: float | None,
    generate: bool,
    text: str | None,
    html: Path | None,
    force: bool,
) -> None:
    """What would fail after the measuring is told before it."""
    for name in ("fluency", "consistency"):
        if least[name] is not None and not generate:
            raise BadInput(f"--min-{name} needs --generate")
    if most is not None and text is None:
        raise BadInput("--max-perplexity-drift needs --text FILE")
    if html is not None:
        check_new_file(html, force=force, what="the page")


def _references(facts: tuple[Fact, ...], path: str | None) -> list[tuple[str, ...]]:
    if path is None:
        return [fact.references for fact in facts]
    from kpatch.evaluate.writing import passages_about
    from kpatch.stats.corpus import open_corpus

    found = passages_about((fact.target for fact in facts), open_corpus(path).documents())
    return [(*fact.references, *found[fact.target]) for fact in facts]


def _text(loaded: Model, path: str | None, tokens: int) -> list[list[int]] | None:
    if path is None:
        return None
    from kpatch.evaluate.perplexity import text_rows
    from kpatch.stats.corpus import open_corpus

    return text_rows(loaded, open_corpus(path).documents(), tokens)


def _gate(found: dict[str, Any], least: dict[str, float | None], most: float | None) -> None:
    """Raise CheckFailed with everything that is not as good as asked for, BadInput for what was not measured."""
    efficacy = found["metrics"]["efficacy"] or {}
    values = {name: rate(found["metrics"], name) for name in ("efficacy", "generalization", "specificity")}
    values |= {"score": found["metrics"]["score"], "free_running": efficacy.get("free_running")}
    values |= {"fluency": found["fluency"], "consistency": found["consistency"]}
    short = []
    for name, wanted in least.items():
        value, option = values[name], f"--min-{name.replace('_', '-')}"
        if wanted is not None and value is None:
            raise BadInput(f"{option} cannot be checked: the facts do not have what it is measured on")
        if wanted is not None and value is not None and value < wanted:
            shown = (f"{wanted:g} bits", f"{value:.3f}") if name == "fluency" else (percent(wanted), percent(value))
            short.append(f"{name.replace('_', ' ')}: expected at least {shown[0]}, found {shown[1]}")
    if most is not None:
        risen = found["perplexity"]["drift"]
        if risen is None:
            raise BadInput("--max-perplexity-drift cannot be checked: there is no patch to compare without")
        if risen > most:
            short.append(f"perplexity: expected a rise of at most {percent(most)}, found {percent(risen)}")
    if short:
        raise CheckFailed("The model falls short of what was asked", details=short)
