"""Training of an editor: steps of Adam on the meta-loss, validation, and an end when that stops falling.

Source: Mitchell et al. 2022 (MEND), section 3.3 and appendix C: what is minimized and how. What differs stands in
docs/baselines.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kpatch.errors import BadInput
from kpatch.facts.fact import Fact
from kpatch.memory import bytes_given
from kpatch.mend.data import Data, learn, locality_text, split
from kpatch.mend.episode import Loss, Question, loss_of
from kpatch.mend.measure import measure, rows_measured
from kpatch.mend.network import Network, Settings
from kpatch.mend.places import last_layers, places
from kpatch.mend.progress import Progress, open_progress
from kpatch.mend.rows import Below
from kpatch.mend.settings import TrainHyper
from kpatch.models.model import Model
from kpatch.reporter import SILENT, Reporter
from kpatch.stats.corpus import SELF

_MINUTE = 60.0  # seconds
_SAVE_EVERY = 60.0  # seconds between saves
TIME_UP = "time was up"
_BUDGET = 800_000_000  # bytes of states that are kept


@dataclass(frozen=True)
class Trained:
    """The editor of the best validation and how training went: a row per validation, and why it ended."""

    network: Network
    history: tuple[dict[str, float], ...]
    steps: int
    ended: str
    facts: tuple[int, int]
    seconds: float
    progress: Progress

    def written(self) -> None:
        """The editor is on disk: what was kept for an interruption goes, unless more time could go on from it."""
        if self.ended != TIME_UP:
            self.progress.forget()

    def to_dict(self) -> dict[str, Any]:
        """What the editor's file and the command's JSON say of the training."""
        return {
            "steps": self.steps,
            "ended": self.ended,
            "facts": {"training": self.facts[0], "validation": self.facts[1]},
            "validation": [dict(row) for row in self.history],
        }


def train(
    model: Model,
    facts: Sequence[Fact],
    hyper: TrainHyper,
    *,
    layers: Sequence[int] | None = None,
    corpus: str = SELF,
    minutes: float | None = None,
    seed: int = 0,
    memory: int | None = None,
    resume: bool = True,
    report: Reporter = SILENT,
) -> Trained:
    """Train an editor for `model` on `facts`; their paraphrases are what the edited model is asked.

    `layers` are the last three unless given; `corpus` is the text that must stay as it is. It ends after
    `hyper.patience` validations without a lower loss, after `hyper.steps`, or after `minutes` of this run. The same
    inputs, seed and machine give the same editor unless `minutes` ended it, however often it was interrupted.
    `memory` is what kept states may take in bytes. Raises BadInput for settings that cannot be, too few facts, wrong
    layers, no memory, a loss that is not finite.
    """
    started = time.monotonic()
    hyper.require()
    budget = bytes_given(memory, _BUDGET, "memory")
    where = places(model, last_layers(model) if layers is None else layers)
    training, held = split(facts, seed)
    count = -(-hyper.batch // hyper.edits) * hyper.edits
    settings = Settings(hyper.rank, hyper.edit_rate, hyper.regression, hyper.covariance)
    network = Network(where, settings, seed).to(model.device)
    progress = open_progress(network, model, facts, hyper, where, corpus, seed, report)
    try:
        if not (resume and progress.load()):
            progress.clear()
        text = locality_text(model, corpus, seed, (hyper.texts, hyper.text_tokens), report)
        data = Data(tuple(learn(model, training)), tuple(learn(model, held)), text, hyper.reads)
        below = Below(model, where[0].layer, budget)
        run = _Run(network, below, data, hyper, seed, count, progress, report)
        if not progress.measured:
            measure(network, below, data, hyper.measured, hyper.batch, report)
            progress.measured = True
        end = None if minutes is None else started + _MINUTE * minutes
        ended = run.until(end)
    except KeyboardInterrupt:
        progress.save()
        raise
    progress.take_best()
    found, seconds = (len(training), len(held)), time.monotonic() - started
    return Trained(network, tuple(progress.history), progress.steps, ended, found, seconds, progress)


class _Run:
    """The steps from where `progress` stands to the end."""

    def __init__(
        self,
        network: Network,
        below: Below,
        data: Data,
        hyper: TrainHyper,
        seed: int,
        count: int,
        progress: Progress,
        report: Reporter,
    ) -> None:
        self.network, self.below, self.data, self.hyper = network, below, data, hyper
        self.seed, self.count, self.progress, self.report = seed, count, progress, report
        # In the order in which they come first, so that a resumed run finds the same batches
        for asked in data.judged(count, seed):
            _together(below, asked)
        for rows in rows_measured(network, data, hyper.measured):
            below.together(row.ids for row in rows)
        for step in range(progress.steps):
            _together(below, data.step(step, count, seed))

    def until(self, end: float | None) -> str:
        """Train; why it ended."""
        progress, saved = self.progress, time.monotonic()
        with self.report.task("Training the editor", None, "step") as advance:
            while True:
                if progress.steps % self.hyper.validate_every == 0 and not progress.validated:
                    self._validate()
                if progress.waited >= self.hyper.patience:
                    return f"no lower validation loss in {progress.waited} validations"
                if progress.steps >= self.hyper.steps:
                    return f"all {self.hyper.steps:,} steps were taken"
                if end is not None and time.monotonic() > end:
                    progress.save()
                    return TIME_UP
                self._step()
                advance(1)
                if time.monotonic() - saved > _SAVE_EVERY:
                    progress.save()
                    saved = time.monotonic()

    def _step(self) -> None:
        asked = self.data.step(self.progress.steps, self.count, self.seed)
        _together(self.below, asked)
        with torch.enable_grad():
            total = self._total(loss_of(self.network, self.below, asked, self.hyper.edits, self.hyper.regression))
        gradients = torch.autograd.grad(total, list(self.network.parameters()), allow_unused=True)
        self.progress.step(gradients, self.hyper)

    def _total(self, loss: Loss) -> Tensor:
        total = self.hyper.edit_weight * loss.edit + self.hyper.locality_weight * loss.locality
        if not bool(torch.isfinite(total)):
            raise BadInput(
                f"The loss is not finite after {self.progress.steps:,} steps",
                details=["expected a number", f"found {float(total.detach())}"],
                hint="lower `settings` learning_rate and step_rate, or load the model with `dtype=float32`",
            )
        return total

    @torch.no_grad()
    def _validate(self) -> None:
        parts = []
        for asked in self.data.judged(self.count, self.seed):
            loss = loss_of(self.network, self.below, asked, self.hyper.edits, self.hyper.regression)
            parts.append([float(part) for part in (self._total(loss), loss.edit, loss.near, loss.text)])
        total, edit, near, text = (math.fsum(column) / len(parts) for column in zip(*parts, strict=True))
        row = {"step": self.progress.steps, "loss": total, "edit": edit, "near": near, "text": text}
        self.progress.judge(row)
        self.report.note(
            f"step {self.progress.steps:,}: validation loss {total:.4f} (edit {edit:.3f}, neighbors {near:.4f},"
            f" text {text:.4f})"
        )


def _together(below: Below, asked: Sequence[Question]) -> None:
    below.together(row.ids for one in asked for row in one.rows)
