"""`kpatch diff`: two patches beside each other, or two checkpoints as a patch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kpatch.cli import options as opt
from kpatch.cli.interference import show_interference
from kpatch.cli.output import Output, begin, clean, percent
from kpatch.errors import BadInput

if TYPE_CHECKING:
    from kpatch.patch.diff import PatchDiff

EXAMPLES = opt.examples("kpatch diff old.patch new.patch", "kpatch diff old/ new/ -o change.patch")

_FACTS_SHOWN = 25


def command(
    a: Annotated[Path, typer.Argument(metavar="A", help="A patch file, or a checkpoint directory: the older one.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another of the same kind: the newer one.")],
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Compare two patches."""
    say = begin(json, quiet, verbose)
    if a.is_dir() != b.is_dir():
        patch, folder = (b, a) if a.is_dir() else (a, b)
        raise BadInput(
            f"{folder} is a directory and {patch} is not; two patches or two checkpoints can be compared",
            hint=f"`kpatch verify {patch} {folder}` says whether the patch fits",
        )
    _patches(say, a, b)


def _patches(say: Output, a: Path, b: Path) -> None:
    from kpatch.patch.diff import diff_patches

    found = diff_patches(a, b, say)
    say.result(found.to_dict())
    first, second = found.patches
    say.line(f"{first.path}  {first.id[:12]}  →  {second.path}  {second.id[:12]}")
    if found.equal:
        say.line("one and the same patch")
        return
    if found.base is not None:
        say.warn(f"made for different models: {found.base}")
    _facts(say, found)
    if found.settings:
        say.line()
        say.table(
            ("Setting", "Before", "After"), [(key, _short(old), _short(new)) for key, old, new in found.settings]
        )
    say.line()
    _weights(say, found)
    if found.base is None:
        say.line()
        show_interference(say, found.patches, found.interference)


def _facts(say: Output, found: PatchDiff) -> None:
    facts = found.facts.to_dict()
    lines = [f"- {fact['text']} → {fact['target']}" for fact in facts["removed"]]
    lines += [f"+ {fact['text']} → {fact['target']}" for fact in facts["added"]]
    lines += [f"~ {fact['text']} → {fact['after']}, was → {fact['before']}" for fact in facts["changed"]]
    shown = lines if say.verbose else lines[:_FACTS_SHOWN]
    for line in shown:
        say.line(clean(line))
    if len(shown) < len(lines):
        say.line(f"… and {len(lines) - len(shown)} more (-v shows all)")
    counts = (len(facts["added"]), len(facts["removed"]), len(facts["changed"]), facts["same"])
    say.line("facts: {} added, {} removed, {} changed, {} the same".format(*counts))


def _weights(say: Output, found: PatchDiff) -> None:
    rows = [
        (
            weight.name,
            *(_number(norm) for norm in weight.norms),
            *weight.ranks,
            "–" if weight.angle is None else f"{weight.angle:.1f}°",
            percent(weight.difference),
        )
        for weight in found.weights
    ]
    headers = ("Weight", "Norm of A's Δ", "of B's", "Rank", "", "Angle", "‖B − A‖")
    say.table(headers, rows, right=(1, 2, 3, 4, 5, 6))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _short(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(str(one)[:12] for one in value) or "–"
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
