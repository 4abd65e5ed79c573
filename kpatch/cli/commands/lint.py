"""`kpatch lint`: everything that can be wrong with a fact file, all at once."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kpatch.cli import options as opt
from kpatch.cli.output import Output, begin
from kpatch.errors import BadInput, KpatchError
from kpatch.text import counted

if TYPE_CHECKING:
    from kpatch.facts.fact import FactFile
    from kpatch.facts.lint import LintReport
    from kpatch.models.address import Resolved

EXAMPLES = opt.examples("kpatch lint facts.yaml", "kpatch lint facts.yaml --model smollm2 -v")


def command(
    facts: opt.Facts,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Also check every subject and target with this model's tokenizer."),
    ] = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Check a fact file, and report everything that is wrong with it.

    With --model, also how its subjects and targets are tokenized and which targets the model gives already; -v shows
    the tokens and what stands between prompt and target.
    """
    output = begin(json, quiet, verbose)
    from kpatch.facts.lint import lint
    from kpatch.facts.load import load_facts

    file = load_facts(facts)
    if model is None:
        report = lint(file)
    else:
        resolved = _resolve(output, model)
        tokenizer = _tokenizer(resolved)
        report = lint(file, tokenizer)
        if not report.errors:
            report = lint(file, tokenizer, _known(output, resolved, file))
    output.result({"path": str(facts), "model": model, **report.to_dict()})
    for finding in report.findings:
        output.line(f"{finding.where or facts}: {finding.level}: {finding.message}")
    if verbose:
        _show_tokens(output, report)
    count = len(report.findings) - report.errors
    said = f"{counted(report.facts, 'fact')}, {counted(count, 'warning')}"
    if report.errors:
        wrong = counted(report.errors, "error")
        raise BadInput(f"{facts}: {said}, {wrong}", hint="`kpatch make` will refuse these facts")
    output.line(f"{facts}: {said}")


def _resolve(output: Output, address: str) -> Resolved:
    from kpatch.models.address import resolve

    resolved = resolve(address, output)
    output.note(resolved.said)
    return resolved


def _tokenizer(resolved: Resolved) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolved.path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(f"The tokenizer of {resolved.name} could not be loaded", details=[reason]) from error


def _known(output: Output, resolved: Resolved, file: FactFile) -> list[int]:
    """The positions of the facts whose target the model gives already; none where it cannot be loaded."""
    from kpatch.evaluate.metrics import measure
    from kpatch.models.model import load_model

    asked = [replace(fact, paraphrases=(), neighbors=()) for fact in file.facts]
    try:
        with output.task(f"Loading {resolved.name}"):
            model = load_model(resolved)
    except KpatchError as error:
        output.note(f"the model is not asked for the targets: {error.message}")
        return []
    found = measure(model, asked, answer_tokens=0, report=output)
    return [outcome.fact for outcome in found.outcomes if outcome.accurate]


def _show_tokens(output: Output, report: LintReport) -> None:
    rows = [
        (row.where, " | ".join(row.subject), row.subject_last, repr(row.join), " | ".join(row.target))
        for row in report.tokens
    ]
    output.table(("Fact", "Subject's tokens", "Last at", "Join", "Target's tokens"), rows, right=(2,))
