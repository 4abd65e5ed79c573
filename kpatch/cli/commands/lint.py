"""`kpatch lint`: everything that can be wrong with a fact file, all at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kpatch.cli import options as opt
from kpatch.cli.output import Output, begin
from kpatch.errors import BadInput

if TYPE_CHECKING:
    from kpatch.facts.lint import LintReport

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
    """Check a fact file, and say everything that is wrong with it.

    With --model, also how its subjects and targets are tokenized; -v shows the tokens.
    """
    output = begin(json, quiet, verbose)
    from kpatch.facts.lint import lint
    from kpatch.facts.load import load_facts

    file = load_facts(facts)
    report = lint(file, None if model is None else _tokenizer(output, model))
    output.result({"path": str(facts), "model": model, **report.to_dict()})
    for finding in report.findings:
        output.line(f"{finding.where or facts}: {finding.level}: {finding.message}")
    if verbose:
        _show_tokens(output, report)
    count = len(report.findings) - report.errors
    said = f"{report.facts:,} facts, {count} warnings"
    if report.errors:
        raise BadInput(f"{facts}: {said}, {report.errors} errors", hint="`kpatch make` will refuse these facts")
    output.line(f"{facts}: {said}")


def _tokenizer(output: Output, model: str) -> Any:
    from kpatch.models.address import resolve

    resolved = resolve(model, output)
    output.note(resolved.said)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolved.path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(f"The tokenizer of {resolved.name} could not be loaded", details=[reason]) from error


def _show_tokens(output: Output, report: LintReport) -> None:
    rows = [(row.where, " | ".join(row.subject), row.subject_last, " | ".join(row.target)) for row in report.tokens]
    output.table(("Fact", "Subject's tokens", "Last at", "Target's tokens"), rows, right=(2,))
