"""`kpatch diff`: two patches beside each other, or two checkpoints as a patch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kpatch.cli import options as opt
from kpatch.cli.output import Cell, Output, begin, clean, percent
from kpatch.cli.tables import print_interference
from kpatch.errors import BadInput
from kpatch.outputs import check_new_file
from kpatch.text import counted, format_size

if TYPE_CHECKING:
    from kpatch.checkpoint.diff.checkpoints import CheckpointDiff
    from kpatch.patch.compare import PatchDiff

EXAMPLES = opt.examples("kpatch diff old.patch new.patch", "kpatch diff old/ new/ -o change.patch")

_FACTS_SHOWN = 25
_TENSORS_SHOWN = 40


def command(
    a: Annotated[Path, typer.Argument(metavar="A", help="A patch file, or a checkpoint directory: the older one.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another of the same kind: the newer one.")],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="PATCH", help="For checkpoints: write the patch that turns A into B."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Store a change as factors where their relative error is within this, as 1e-6."
            " Default: only what gives B bit for bit.",
        ),
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option("--max-rank", min=1, metavar="N", help="Try no factors with more columns.")
    ] = None,
    seed: opt.Seed = 0,
    force: opt.Force = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Compare two patches, or two checkpoints.

    Of two checkpoint directories, -o makes a patch.
    """
    output = begin(json, quiet, verbose)
    if a.is_dir() != b.is_dir():
        patch, folder = (b, a) if a.is_dir() else (a, b)
        raise BadInput(
            f"{folder} is a directory and {patch} is not; two patches or two checkpoints can be compared",
            hint=f"`kpatch verify {patch} {folder}` says whether the patch fits",
        )
    if a.is_dir():
        _checkpoints(output, a, b, out, tolerance, max_rank, seed, force)
    elif out or tolerance is not None or max_rank is not None:
        raise BadInput("-o, --tolerance and --max-rank are for two checkpoint directories", hint="`kpatch stack` adds")
    else:
        _patches(output, a, b)


def _checkpoints(
    output: Output,
    a: Path,
    b: Path,
    out: Path | None,
    tolerance: float | None,
    max_rank: int | None,
    seed: int,
    force: bool,
) -> None:
    if out is None and (tolerance is not None or max_rank is not None):
        raise BadInput("--tolerance and --max-rank say how a patch is stored; name it with -o")
    if out is not None:
        check_new_file(out, force=force, what="a patch")
    from kpatch.checkpoint.diff.checkpoints import diff_checkpoints

    found = diff_checkpoints(a, b, out, tolerance=tolerance, max_rank=max_rank, seed=seed, force=force, report=output)
    output.result(found.to_dict())
    total = len(found.tensors) + found.same
    if found.equal:
        output.line(f"{a} and {b}: the same {total} tensors")
        return
    shown = found.tensors if output.verbose else found.tensors[:_TENSORS_SHOWN]
    rows: list[list[Cell]] = []
    for tensor in shown:
        row: list[Cell] = [tensor.name, " × ".join(map(str, tensor.shape)), f"{tensor.norm:.3g}"]
        row.append(percent(tensor.relative_norm))
        if tensor.form is not None:
            row += [f"rank {tensor.rank}" if tensor.form == "lowrank" else "dense", format_size(tensor.bytes)]
            row += [f"{tensor.differs:,}" if tensor.differs else "–"]
        rows.append(row)
    headers = ("Tensor", "Shape", "Norm of B − A", "of A", "Stored", "Size", "Entries off")
    output.table(headers[: len(rows[0])], rows, right=tuple(range(2, len(rows[0]))))
    if len(shown) < len(found.tensors):
        output.line(f"… and {len(found.tensors) - len(shown)} more (-v shows all)")
    if found.path is None or found.id is None:
        output.line(f"{len(found.tensors)} of {counted(total, 'tensor')} differ; {found.seconds:.1f} s")
        output.note(f"next: kpatch diff {a} {b} -o PATCH")
        return
    differ = f"{len(found.tensors)} of {counted(total, 'tensor')} differ"
    output.line(f"{found.path}  {found.id[:12]}  {format_size(found.bytes)}: {differ}")
    _exactness(output, found)
    output.note(f"next: kpatch show {found.path}; kpatch apply {found.path} {a}")


def _exactness(output: Output, found: CheckpointDiff) -> None:
    """Does the patch give B bit for bit, and what would less than that save?"""
    off = sum(tensor.differs or 0 for tensor in found.tensors)
    if not off:
        output.line(f"applied to {found.a} it gives {found.b} bit for bit; {found.seconds:.1f} s")
    else:
        entries = sum(tensor.entries for tensor in found.tensors)
        worst = max(tensor.error or 0.0 for tensor in found.tensors)
        missed_part = f"{off:,} of {entries:,} entries ({percent(off / entries)})"
        output.line(f"applied to {found.a} it gives {found.b} but for {missed_part}; {found.seconds:.1f} s")
        output.line(f"largest relative error of a tensor's change {worst:.2g}")
    missed = [(tensor, tensor.shorter) for tensor in found.tensors if tensor.shorter is not None]
    if missed:
        saved = sum((tensor.bytes or 0) - shorter[1] for tensor, shorter in missed)
        share = sum(shorter[2] for _, shorter in missed) / sum(tensor.entries for tensor, _ in missed)
        output.note(
            f"{len(missed)} changes of low rank are stored otherwise, because as factors {percent(share)} of their "
            f"entries would miss B's bits; --tolerance 1e-6 does without those and saves {format_size(saved)}"
        )


def _patches(output: Output, a: Path, b: Path) -> None:
    from kpatch.patch.compare import diff_patches

    found = diff_patches(a, b, output)
    output.result(found.to_dict())
    first, second = found.patches
    output.line(f"{first.path}  {first.id[:12]}  →  {second.path}  {second.id[:12]}")
    if found.equal:
        output.line("one and the same patch")
        return
    if found.base is not None:
        output.warn(f"made for different models: {found.base}")
    _facts(output, found)
    if found.settings:
        output.line()
        output.table(
            ("Setting", "Before", "After"), [(key, _short(old), _short(new)) for key, old, new in found.settings]
        )
    output.line()
    _weights(output, found)
    _sizes(output, found)
    if found.base is None:
        output.line()
        print_interference(output, found.patches, found.interference)


def _facts(output: Output, found: PatchDiff) -> None:
    facts = found.facts.to_dict()
    lines = [f"- {fact['text']} → {fact['target']}" for fact in facts["removed"]]
    lines += [f"+ {fact['text']} → {fact['target']}" for fact in facts["added"]]
    lines += [f"~ {fact['text']} → {fact['after']}, was → {fact['before']}" for fact in facts["changed"]]
    shown = lines if output.verbose else lines[:_FACTS_SHOWN]
    for line in shown:
        output.line(clean(line))
    if len(shown) < len(lines):
        output.line(f"… and {len(lines) - len(shown)} more (-v shows all)")
    counts = (len(facts["added"]), len(facts["removed"]), len(facts["changed"]), facts["same"])
    output.line("facts: {} added, {} removed, {} changed, {} the same".format(*counts))


def _weights(output: Output, found: PatchDiff) -> None:
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
    output.table(headers, rows, right=(1, 2, 3, 4, 5, 6))


def _sizes(output: Output, found: PatchDiff) -> None:
    """Warn of a patch that is as large as changes that break a model, else of both together where they can be."""
    from kpatch.patch.size import FEWER, RESOLVE, parts_by_weight, size_of, size_of_sum, the_sum, warning

    large = [text for info in found.patches if (text := warning(info.name, size_of(info.manifest), FEWER))]
    # Two versions of one patch share facts, and nobody applies both
    if not large and found.base is None and not found.facts.same and not found.facts.changed:
        both = warning(the_sum(found.patches), size_of_sum(parts_by_weight(found.patches)), RESOLVE)
        large = [both] if both else []
    for text in large:
        output.warn(text)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _short(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(str(one)[:12] for one in value) or "–"
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
