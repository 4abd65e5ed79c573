"""Rates from single results: success, magnitude, accuracy, and the Score. Arithmetic only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("efficacy", "generalization", "specificity")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one prompt shows: `fact` is the number of the fact it belongs to, `kind` one of KINDS.

    success: the right answer beats its rival in mean log-probability per token; magnitude: by how much in P per token.
    Both are None where there is no rival. accurate: every token of the right answer is the argmax. free: the right
    answer is in what the model writes by itself; None where it did not write.
    """

    fact: int
    kind: str
    success: bool | None
    magnitude: float | None
    accurate: bool
    free: bool | None = None


def summarize(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """METRICS of some outcomes: for each kind {success, magnitude, accuracy, n, compared} or None, and `score`.

    `n` counts prompts, and accuracy is over all of them. `compared` counts those with a rival; success and magnitude
    are over these, and None where there are none. `score` is the harmonic mean of the successes that there are. A
    kind whose prompts were answered freely has `free_running` too.
    """
    outcomes = list(outcomes)
    metrics: dict[str, Any] = {kind: _rates([o for o in outcomes if o.kind == kind]) for kind in KINDS}
    successes = [metrics[kind]["success"] for kind in KINDS if metrics[kind] is not None]
    metrics["score"] = harmonic_mean([rate for rate in successes if rate is not None])
    return metrics


def harmonic_mean(rates: Sequence[float]) -> float | None:
    """The harmonic mean of rates: 0 where one of them is 0, None for no rates."""
    if not rates:
        return None
    return 0.0 if min(rates) <= 0 else len(rates) / sum(1 / rate for rate in rates)


def _rates(outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    if not outcomes:
        return None
    successes = [outcome.success for outcome in outcomes if outcome.success is not None]
    magnitudes = [outcome.magnitude for outcome in outcomes if outcome.magnitude is not None]
    free = [outcome.free for outcome in outcomes if outcome.free is not None]
    return {
        "success": sum(successes) / len(successes) if successes else None,
        "magnitude": sum(magnitudes) / len(magnitudes) if magnitudes else None,
        "accuracy": sum(outcome.accurate for outcome in outcomes) / len(outcomes),
        "n": len(outcomes),
        "compared": len(successes),
        **({"free_running": sum(free) / len(free)} if free else {}),
    }
