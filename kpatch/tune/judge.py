"""What a setting is worth: one joint edit of pilot facts in memory, and what the edited model says then.

Measured are efficacy, paraphrases and neighbors, each as success and as log-probability a token, and the drift of
what the model says of other subjects. docs/tune.md has the formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from kpatch.edit.methods import Inputs, Method
from kpatch.edit.presets import HyperParams
from kpatch.edit.weights import add, restored
from kpatch.evaluate.forward import logits_at
from kpatch.evaluate.rates import harmonic_mean
from kpatch.evaluate.score import Scored, score
from kpatch.facts.conflicts import words_of
from kpatch.facts.fact import SLOT, Fact
from kpatch.facts.tokens import Item, encode_many
from kpatch.facts.wordings import with_wordings
from kpatch.models.model import Model
from kpatch.stats.subjects import statements, subjects

NEAR = 0.02  # a smaller difference of Scores is a near tie: it is about one answer of a paraphrase or a neighbor
_TEXTS = 48  # statements about other subjects whose next token is looked at


@dataclass(frozen=True)
class Setting:
    """What is tried: the method's hyperparameters, R among them, and the wordings that facts are learned in."""

    hyper: HyperParams
    wordings: str


@dataclass(frozen=True)
class Verdict:
    """How pilot facts took one setting.

    efficacy, paraphrases, neighbors  shares of right preferences, means over facts
    target  mean log-probability of the target, a token, after paraphrases   right  how much that of the neighbors'
    right answers changed   drift  mean KL, in nats, of the next token after statements about other subjects
    gains  target + right of each fact
    """

    efficacy: float
    paraphrases: float
    neighbors: float
    target: float
    right: float
    drift: float
    gains: tuple[float, ...]

    @property
    def score(self) -> float:
        """The harmonic mean of the three shares; 0 where one is 0."""
        return harmonic_mean([self.efficacy, self.paraphrases, self.neighbors]) or 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"gains": list(self.gains)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Verdict:
        """The inverse. Raises KeyError, TypeError or ValueError for anything else."""
        numbers = {name: float(data[name]) for name in _NUMBERS}
        return Verdict(**numbers, gains=tuple(float(gain) for gain in data["gains"]))


_NUMBERS = ("efficacy", "paraphrases", "neighbors", "target", "right", "drift")


def compare(new: Verdict, old: Verdict) -> tuple[bool, str]:
    """Whether `new` takes the place of `old`, a verdict on the same facts, and why.

    The higher Score wins. In a near tie the log-probabilities decide, and what is in use stays unless the mean gain
    over the facts is larger than its standard error.
    """
    scores = f"Score {100 * new.score:.1f} against {100 * old.score:.1f}"
    if abs(new.score - old.score) >= NEAR:
        return new.score > old.score, scores
    gains = [a - b for a, b in zip(new.gains, old.gains, strict=True)]
    error = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("inf")
    gain = fmean(gains) - (new.drift - old.drift)
    return gain > error, f"{scores}, a near tie; log-probabilities {gain:+.2f} ± {error:.2f}"


class Judge:
    """Tries settings of `method` on `facts`, one joint edit each; the model is left as it was, bit for bit."""

    def __init__(self, model: Model, method: Method, facts: Sequence[Fact]) -> None:
        self.model, self.method, self.facts = model, method, tuple(facts)
        self.asked = _asked(self.facts)
        self.texts = _other_texts(self.facts)
        self.before: tuple[list[Scored], Tensor] | None = None

    def judge(self, setting: Setting, inputs: Inputs) -> Verdict:
        """Edit all facts together with `setting`, and measure. Raises as the method's `edit` does."""
        if self.before is None:
            self.before = self._look()
        facts = with_wordings(self.facts, setting.wordings)
        found = self.method.edit(self.model, facts, setting.hyper, inputs)
        with restored(self.model, found.deltas):
            for name, delta in found.deltas.items():
                add(self.model, name, delta)
            after = self._look()
        return self._verdict(self.before, after)

    def _look(self) -> tuple[list[Scored], Tensor]:
        """Every answer's score, and log-probabilities [n, V] of what follows the other statements."""
        rows = encode_many(self.model.tokenizer, [item for _, _, _, item in self.asked])
        scored = score(self.model, [(row.ids[: row.prompt_len], row.ids[row.prompt_len :]) for row in rows])
        return scored, _next_tokens(self.model, self.texts)

    def _verdict(self, before: tuple[list[Scored], Tensor], after: tuple[list[Scored], Tensor]) -> Verdict:
        successes: dict[str, dict[int, list[float]]] = {kind: {} for kind in ("efficacy", "paraphrase", "neighbor")}
        logprobs: dict[str, dict[int, list[float]]] = {kind: {} for kind in successes}
        answers = list(zip(self.asked, before[0], after[0], strict=True))
        for ((fact, kind, _, _), was, now), (_, _, rival) in zip(answers[0::2], answers[1::2], strict=True):
            successes[kind].setdefault(fact, []).append(float(now.mean_logprob > rival.mean_logprob))
            change = was.mean_logprob if kind == "neighbor" else 0.0
            logprobs[kind].setdefault(fact, []).append(now.mean_logprob - change)
        shares = {kind: fmean(map(fmean, found.values())) for kind, found in successes.items()}
        target = [fmean(logprobs["paraphrase"][fact]) for fact in range(len(self.facts))]
        right = [fmean(logprobs["neighbor"][fact]) for fact in range(len(self.facts))]
        kl = (before[1].exp() * (before[1] - after[1])).sum(-1)  # (n,)
        return Verdict(
            efficacy=shares["efficacy"],
            paraphrases=shares["paraphrase"],
            neighbors=shares["neighbor"],
            target=fmean(target),
            right=fmean(right),
            drift=float(kl.double().mean()),
            gains=tuple(a + b for a, b in zip(target, right, strict=True)),
        )


def _asked(facts: Sequence[Fact]) -> list[tuple[int, str, str, Item]]:
    """(fact, kind, side, item) of every question, the right answer and then its rival."""
    asked = []
    for number, fact in enumerate(facts):
        questions: list[tuple[str, str, str, str | None, str | None]] = []
        questions += [("efficacy", fact.prompt, fact.subject, fact.target, fact.was)]
        questions += [("paraphrase", text, fact.subject, fact.target, fact.was) for text in fact.paraphrases]
        questions += [("neighbor", SLOT, one.prompt, one.target, fact.target) for one in fact.neighbors]
        for kind, prompt, subject, right, rival in questions:
            assert right is not None
            assert rival is not None
            asked += [(number, kind, "right", Item(prompt, subject, right))]
            asked += [(number, kind, "rival", Item(prompt, subject, rival))]
    return asked


def _other_texts(facts: Sequence[Fact]) -> list[Item]:
    """Statements about subjects that no fact names and that the update does not hold (every second one is held)."""
    named = " ".join(
        f" {' '.join(words_of(text))} "
        for fact in facts
        for text in (fact.subject, fact.target, fact.was or "", *(neighbor.prompt for neighbor in fact.neighbors))
    )
    free = [one for one in subjects()[1::2] if f" {' '.join(words_of(one.name))} " not in named]
    chosen = free[:: max(1, len(free) // _TEXTS)][:_TEXTS]
    return [Item(statements(one)[number % len(statements(one))], one.name) for number, one in enumerate(chosen)]


@torch.no_grad()
def _next_tokens(model: Model, texts: Sequence[Item]) -> Tensor:
    """Log-probabilities [n, V] of the token that follows each text, on the CPU."""
    rows = [row.ids for row in encode_many(model.tokenizer, texts)]
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[model.pad_id] * (width - len(row))] for row in rows])  # (n, T)
    lengths = torch.tensor([len(row) for row in rows])
    real = torch.arange(width) < lengths[:, None]
    logits, _ = logits_at(model, ids, torch.arange(len(rows)), lengths - 1, real)
    return logits.log_softmax(-1).cpu()
