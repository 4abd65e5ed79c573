"""What `make` and `stack --resolve` say at their end: the patch, and what it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kpatch.cli.effect import show_facts, show_metrics
from kpatch.cli.output import Output, size

if TYPE_CHECKING:
    from kpatch.edit.pipeline import MakeResult


def tell_made(say: Output, result: MakeResult) -> None:
    """Print a patch just made and what it does, for people and as JSON."""
    say.result(
        {
            "patch": {"id": result.patch_id, "path": str(result.path), "bytes": result.bytes},
            "model": result.model,
            "method": result.method,
            "layers": list(result.layers),
            "facts": result.facts,
            "effect": {key: result.effect.get(key) for key in ("before", "after")},
            "seconds": result.seconds,
            "peak_memory_bytes": result.peak_memory_bytes,
        }
    )
    show_facts(say, result.facts, limit=None if say.verbose else 25)
    say.line()
    show_metrics(say, result.effect)
    say.line()
    total = result.seconds.get("total", 0.0)
    peak = "" if not result.peak_memory_bytes else f", {size(result.peak_memory_bytes)} of memory at most"
    say.line(f"{result.path}  {result.patch_id[:12]}  {size(result.bytes)}, made in {total:.1f} s{peak}")
    say.note(f"next: kpatch show {result.path}; kpatch apply {result.path} MODEL_DIR")
