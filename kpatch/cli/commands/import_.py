"""`kpatch import`: published data sets as fact files, and fact files in another form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kpatch.cli import options as opt
from kpatch.cli.output import Output, begin
from kpatch.text import counted

EXAMPLES = opt.examples(
    "kpatch import counterfact.json -o facts.yaml --limit 100",
    "kpatch import zsre_mend_eval.json -o facts.jsonl --target answers",
)
_SHOWN = 20


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A data set: JSON, JSON Lines or CSV; or a fact file.")],
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", metavar="FACTS", help="The file to write: .yaml, .jsonl, or .json for EasyEdit's flat form."
        ),
    ],
    format_: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="NAME",
            help="akew, cknowedit, counterfact, easyedit, facts, hallu, knowedit, known, memit, mquake, ripple, "
            "uniedit, wikibigedit or zsre. Default: detected from the records.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="alt|answers",
            help="Which answer of zsRE to learn: its false one (alt, the default) or the true one (answers).",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Read the first N records only.")] = None,
    drop_conflicts: Annotated[
        bool,
        typer.Option("--drop-conflicts", help="Leave out facts that contradict earlier ones, which make refuses."),
    ] = False,
    force: opt.Force = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Turn a published data set into a fact file.

    Records that break a rule are listed and counted, and so are the keys that are left out; -v lists all of them.
    """
    output = begin(json, quiet, verbose)
    from kpatch.facts.importers.read import import_facts
    from kpatch.facts.write import write_facts

    found = import_facts(file, format_, target=target, limit=limit, drop_conflicts=drop_conflicts)
    write_facts(out, found.facts, force=force)
    output.result(
        {
            "path": str(out),
            "format": found.format,
            "records": found.records,
            "facts": len(found.facts),
            "rejected": list(found.rejected),
            "repeats": list(found.repeats),
            "conflicts": list(found.conflicts),
            "conflicts_dropped": drop_conflicts,
            "left_out": dict(found.left_out),
        }
    )
    if found.format == "zsre":
        output.note("target: the true answers" if target == "answers" else "target: the false answers, alt")
    _list(output, "left out, for they break a rule", found.rejected)
    _list(output, "left out, for they repeat an earlier fact", found.repeats)
    what = "left out, for they contradict an earlier fact"
    if not drop_conflicts:
        what = "kept, though they contradict an earlier fact (`make` refuses them, --drop-conflicts leaves them out)"
    _list(output, what, found.conflicts)
    if found.left_out:
        names = ", ".join(f"{name} ({count:,})" for name, count in found.left_out.items())
        output.warn(f"keys left out, with the number of records that have them: {names}")
    output.line(f"{out}: {counted(len(found.facts), 'fact')} from {counted(found.records, 'record')} ({found.format})")


def _list(output: Output, what: str, lines: tuple[str, ...]) -> None:
    if not lines:
        return
    output.warn(f"{len(lines):,} {what}:")
    shown = lines if output.verbose else lines[:_SHOWN]
    for line in shown:
        output.warn(f"  {line}")
    if len(shown) < len(lines):
        output.warn(f"  and {len(lines) - len(shown):,} more (-v lists them)")
