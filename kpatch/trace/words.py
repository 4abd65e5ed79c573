"""What a trace comes to, in words."""

from __future__ import annotations

from kpatch.trace.roles import DRAWS
from kpatch.trace.summary import Summary


def told(summary: Summary) -> str:
    """R, how clear it is and how stable."""
    found, stable = summary.range, summary.stability
    if found is None:
        return (
            "No layers to edit stand out: at the last subject token, severing MLPs takes less than a tenth of the"
            " total effect away"
        )
    text = (
        f"R = {span(found.first, found.last)} ({found.width} of {summary.traces.layers} layers): severing MLPs takes"
        f" {100 * found.gap:.1f} points of probability away"
    )
    if found.margin is not None:
        text += f", {100 * found.margin:.1f} more than in the best range as wide beside it"
    if stable is None:
        return f"{text}; from one fact only, so trace more before editing by it"
    return f"{text}; {100 * stable.same:.0f} % of {DRAWS:,} resamples of the facts give the same R"


def span(first: int, last: int) -> str:
    """Layers as people write them."""
    return str(first) if first == last else f"{first}–{last}"
