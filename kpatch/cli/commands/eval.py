"""`kpatch eval`: what a model makes of facts, with patches and without; a gate where thresholds are given."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kpatch.cli import options as opt
from kpatch.cli import parse
from kpatch.cli.gates import Thresholds, rates_of, shortfalls
from kpatch.cli.output import begin, percent
from kpatch.cli.targets import check_patches, facts_and_model, open_facts, open_model
from kpatch.errors import BadInput, CheckFailed
from kpatch.evaluate.with_without import without_and_with
from kpatch.outputs import check_new_file

if TYPE_CHECKING:
    from kpatch.evaluate.assess import Assessment
    from kpatch.facts.fact import Fact
    from kpatch.models.model import Model

EXAMPLES = opt.examples(
    "kpatch eval facts.yaml smollm2 --patch news.patch --min-efficacy 0.95 --min-specificity 0.7",
    "kpatch eval facts.yaml model/ --forms completion,question,chat --text wiki.txt --html report.html",
)


def command(
    facts: opt.FactsFirst,
    model: opt.Model,
    patch: opt.Patches = None,
    limit: opt.FirstFacts = None,
    forms: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Also let the model answer by itself, up to 64 tokens, in these forms in which people ask:"
            " completion (prompts and paraphrases), question (as plain text), chat (in the model's chat template)."
            " Default: the rates alone, which are of completions.",
        ),
    ] = None,
    consequences: Annotated[
        bool,
        typer.Option(
            "--consequences",
            help="Also probe what else follows: neighbors behind the new fact, negation, a choice, yes or no,"
            " the reversed question, hops, what else is said of the subject.",
        ),
    ] = False,
    generate: Annotated[
        bool,
        typer.Option(
            "--generate", help="Let the model write: fluency, repetition, consistency, free-running paraphrases."
        ),
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
        str | None, typer.Option(metavar="PATH", help="Also measure the perplexity of this text, before and after.")
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=2, metavar="N", help="How much of the text to read.")] = 8192,
    min_efficacy: opt.MinRate = None,
    min_generalization: opt.MinRate = None,
    min_specificity: opt.MinRate = None,
    min_score: opt.MinRate = None,
    min_free_running: opt.MinRate = None,
    min_fluency: Annotated[
        float | None, typer.Option(min=0.0, metavar="BITS", help="Exit 1 below this; needs --generate.")
    ] = None,
    min_consistency: opt.MinRate = None,
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
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the texts and the bootstrap samples.")] = 0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    max_memory: opt.MaxMemory = None,
    modules: opt.Modules = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Measure what a model makes of facts.

    Efficacy, generalization and specificity with 95 % intervals; beside them the model without its patches: those of
    --patch, or those that MODEL carries. Thresholds make it a gate.
    """
    output = begin(json, quiet, verbose)
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
    _check_options(least, max_perplexity_drift, generate, text)
    if html is not None:
        check_new_file(html, force=force, what="the page")
    asked = parse.forms(forms)
    path, address = facts_and_model(facts, model)
    names = parse.modules(modules)
    chosen = open_facts(output, path, conflicts=True).facts[:limit]
    check_patches(patch or ())
    loaded = open_model(output, address, device, dtype, names, parse.max_memory(max_memory))

    from kpatch.evaluate.assess import Wanted, assess, compared

    wanted = Wanted(
        generate=generate,
        tokens=length,
        references=_references(chosen, references) if generate else (),
        forms=asked,
        consequences=consequences,
        text=_text(loaded, text, text_tokens),
        samples=samples,
        seed=seed,
    )
    before, after, on = without_and_with(output, loaded, patch or [], lambda: assess(loaded, chosen, wanted, output))
    if before is not None:
        after = compared(chosen, before, after, wanted)
    found = _as_json(loaded.name, on, before, after, text is not None, time.monotonic() - started)
    unpatched = () if before is None else before.facts
    output.result({**found, "facts": list(after.facts)} if per_fact else found)

    from kpatch.cli.asked import print_asked
    from kpatch.cli.tables import print_evaluation

    print_evaluation(output, found, after.facts if per_fact else (), unpatched)
    print_asked(output, found, after.facts if per_fact else ())
    if html is not None:
        from kpatch.cli.html import write_page

        write_page(html, path.name, found, after.facts, unpatched)
        output.note(f"{html} written")
    _check_thresholds(found, least, max_perplexity_drift)


def _check_options(least: Thresholds, most_drift: float | None, generate: bool, text: str | None) -> None:
    """Refuse before the measuring what could not be checked after it."""
    for name in ("fluency", "consistency"):
        if least[name] is not None and not generate:
            raise BadInput(f"`min_{name}` needs `generate`")
    if most_drift is not None and text is None:
        raise BadInput("`max_perplexity_drift` needs `text=FILE`")


def _references(facts: Sequence[Fact], path: str | None) -> list[tuple[str, ...]]:
    """For each fact, texts about its target: its own, and the paragraphs of a file that name it."""
    if path is None:
        return [fact.references for fact in facts]
    from kpatch.evaluate.writing import passages_about
    from kpatch.stats.corpus import open_corpus

    found = passages_about((fact.target for fact in facts), open_corpus(path).documents())
    return [(*fact.references, *found[fact.target]) for fact in facts]


def _text(model: Model, path: str | None, tokens: int) -> list[list[int]] | None:
    """The text whose perplexity is measured, as rows of ids."""
    if path is None:
        return None
    from kpatch.evaluate.perplexity import text_rows
    from kpatch.stats.corpus import open_corpus

    return text_rows(model, open_corpus(path).documents(), tokens)


def _as_json(
    model: str, patches: list[str], before: Assessment | None, after: Assessment, text: bool, seconds: float
) -> dict[str, Any]:
    """The JSON object of `eval`, without single facts."""
    from kpatch.evaluate.assess import drift

    read = {"before": None if before is None else before.perplexity, "after": after.perplexity}
    return {
        "model": model,
        "patches": patches,
        "evaluated": len(after.facts),
        "metrics": after.metrics,
        "unpatched": None if before is None else {**before.metrics, **before.writing, **before.asked},
        "fluency": None,
        "repetition": None,
        "consistency": None,
        **after.writing,
        **after.asked,
        "perplexity": {**read, "drift": drift(read["before"], read["after"])} if text else None,
        "seconds": seconds,
    }


def _check_thresholds(found: dict[str, Any], least: Thresholds, most_drift: float | None) -> None:
    """Raise CheckFailed with everything that misses its threshold, BadInput for what was not measured."""
    efficacy = found["metrics"]["efficacy"] or {}
    values = rates_of(found["metrics"])
    values |= {"score": found["metrics"]["score"], "free_running": efficacy.get("free_running")}
    values |= {"fluency": found["fluency"], "consistency": found["consistency"]}
    short = shortfalls(values, least)
    if most_drift is not None:
        risen = found["perplexity"]["drift"]
        if risen is None:
            raise BadInput("`max_perplexity_drift` cannot be checked: there is no patch to compare without")
        if risen > most_drift:
            short.append(f"perplexity: expected a rise of at most {percent(most_drift)}, found {percent(risen)}")
    if short:
        raise CheckFailed("The model falls short of what was asked", details=short)
