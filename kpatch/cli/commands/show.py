"""`kpatch show`: what a patch file says of itself, from its header alone."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kpatch.cli import options as opt
from kpatch.cli.output import Output, begin, clean, percent
from kpatch.cli.tables import print_facts, print_rates
from kpatch.text import counted, format_size, ranges

EXAMPLES = opt.examples("kpatch show news.patch", "kpatch show news.patch --memories smollm2")

_FACTS_SHOWN = 25


def command(
    patch: opt.Patch,
    memories: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Also load the patch's base, and show through which units each fact is written."
        ),
    ] = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Show a patch: facts, base, layers, sizes, measured effect."""
    from kpatch.patch.header import read_header
    from kpatch.patch.size import FEWER, size_of, warning

    output = begin(json, quiet, verbose)
    info = read_header(patch)
    manifest: dict[str, Any] = info.manifest.to_dict()
    output.result({**manifest, "id": info.id, "bytes": info.bytes, "weights": info.weights()})
    _summary(output, manifest, f"{info.path}  {info.id if verbose else info.id[:12]}  {format_size(info.bytes)}")
    _facts(output, manifest, None if verbose else _FACTS_SHOWN)
    _weights(output, info.weights())
    large = warning(info.name, size_of(info.manifest), FEWER)
    if large:
        output.warn(large)
    if memories is not None:
        from kpatch.cli.patch_writes import show_writes

        show_writes(output, patch, memories, whole=verbose)


def _summary(output: Output, manifest: dict[str, Any], title: str) -> None:
    base, covariance = manifest["base"], manifest["covariance"]
    revision = f" at {base['revision']}" if base["revision"] else ""
    dtypes = ", ".join(sorted({weight["dtype"] for weight in base["weights"].values()}))
    settings = ", ".join(f"{key} {_short(value)}" for key, value in manifest["hyperparameters"].items())
    rows = [
        ("base", f"{base['name']}{revision} ({base['family']}, {dtypes})"),
        ("method", f"{manifest['method']}, layers {ranges(manifest['layers'])}"),
        ("settings", settings),
        ("learned as", _learned(manifest)),
        ("protects", ", ".join(str(one["subject"]) for one in manifest.get("protect", ()))),
        ("covariance", "" if covariance is None else f"{covariance['corpus']}, {covariance['tokens']:,} tokens"),
        ("holds", ", ".join(f"{part['id'][:12]} × {part['scale']:g}" for part in manifest.get("stack", ()))),
        ("on top of", ", ".join(parent[:12] for parent in manifest["parents"])),
        ("made by", manifest["tool"]),
    ]
    output.line(clean(title))
    for name, text in rows:
        if text:
            output.line(f"  {name:<11} {clean(text)}")


def _learned(manifest: dict[str, Any]) -> str:
    """In how many other wordings and questions the facts were learned, and the first of the wordings."""
    facts = manifest["facts"]
    wordings = [wording for fact in facts for wording in fact.get("wordings", ())]
    known = list(dict.fromkeys(wordings))
    asked = sum("question" in fact for fact in facts) if manifest["hyperparameters"].get("chat") else 0
    parts = ["the prompts" if known or asked else "the prompts' own wordings"]
    if asked:
        parts.append(f"{counted(asked, 'question')} in chat form")
    if known:
        more = f" and {len(known) - 2} more" if len(known) > 2 else ""
        parts.append(f"{counted(len(wordings), 'other wording')}: {'; '.join(known[:2])}{more}")
    further = sum(len(fact.get("further", ())) for fact in facts)
    if further:
        parts.append(f"refined by {further} more")
    return ", ".join(parts)


def _facts(output: Output, manifest: dict[str, Any], limit: int | None) -> None:
    facts, effect = manifest["facts"], manifest["effect"] or {}
    output.line()
    if effect.get("facts"):
        print_facts(output, effect["facts"], limit)
    else:
        rows = [(fact["prompt"].replace("{}", fact["subject"]), fact["target"], fact.get("was")) for fact in facts]
        output.table(("Prompt", "Target", "Was"), rows[:limit])
        if limit is not None and len(rows) > limit:
            output.line(f"… and {len(rows) - limit} more facts (-v shows all)")
    if effect.get("after"):
        output.line()
        print_rates(output, effect)


def _weights(output: Output, weights: list[dict[str, Any]]) -> None:
    output.line()
    rows = [
        (
            weight["name"],
            " × ".join(str(side) for side in weight["shape"]),
            weight["rank"],
            f"{weight['norm']:.3g}",
            percent(weight["relative_norm"]),
        )
        for weight in weights
    ]
    output.table(("Weight", "Shape", "Rank", "Norm of Δ", "of the weight"), rows, right=(2, 3, 4))


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
