"""The search behind `kpatch tune`: R first, then one number after another, each with the best found before it.

Half of the pilot facts choose. The other half is asked twice, with the defaults and with what was chosen, and says
what the choice is worth on facts that it was not made on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from kpatch.edit.methods import DEFAULT_BUDGET, Inputs, hyper_for, method_named, with_settings
from kpatch.edit.preset_file import PresetFile, TunedOn
from kpatch.errors import CheckFailed
from kpatch.facts.fact import Fact
from kpatch.memory import bytes_given
from kpatch.models.fingerprint import weights_fingerprint
from kpatch.models.model import Model
from kpatch.reporter import SILENT, Reporter
from kpatch.text import counted, ranges
from kpatch.trace.run import TraceSettings, trace
from kpatch.trace.summary import Summary
from kpatch.tune.candidates import DEPTHS, NUMBERS, QUICK, WORDINGS, LayersToTry, by_depth, by_trace
from kpatch.tune.judge import Judge, Setting, Verdict, compare
from kpatch.tune.kept import keep, kept_verdict
from kpatch.tune.pilots import pilots_for

METHOD = "memit"
MINUTES = 30.0
QUICK_MINUTES = 3.0
_QUICK_FACTS = 8
_TRACED = 16  # facts
_TRACE_COSTS = 2.0  # edits, about


@dataclass(frozen=True)
class Trial:
    """One setting that was tried: what was changed, to what, where that came from, and what came of it.

    `verdict` is None where time was up before it. `chosen` says that it took the place of what was in use.
    """

    what: str
    value: str
    origin: str
    verdict: Verdict | None
    chosen: bool
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        found = {"what": self.what, "value": self.value, "origin": self.origin}
        return found | {"chosen": self.chosen, "reason": self.reason} | figures(self.verdict)


def figures(verdict: Verdict | None) -> dict[str, float | None]:
    """A verdict's numbers, rounded so that two machines say the same; shares and the Score from 0 to 1."""
    names = ("score", "efficacy", "paraphrases", "neighbors", "target", "right", "drift")
    return {name: None if verdict is None else round(getattr(verdict, name), 4) for name in names}


@dataclass
class Tuned:
    """What a search found.

    facts  pilots that chose, pilots that report, and how many were left out   reported  verdicts of the reporting
    half with the defaults and with what was chosen; None where it was not asked   complete  time was enough for all
    """

    model: TunedOn
    default: Setting
    setting: Setting
    trials: list[Trial]
    facts: tuple[int, int, int]
    reported: tuple[Verdict, Verdict] | None
    complete: bool
    seconds: float = field(default=0.0, compare=False)

    @property
    def better(self) -> bool | None:
        """Whether the reporting half prefers what was chosen; None where it was not asked, or nothing changed."""
        if self.reported is None or self.setting == self.default:
            return None
        return compare(self.reported[1], self.reported[0])[0]

    def to_dict(self) -> dict[str, Any]:
        """JSON form of what was tried and measured."""
        reported = self.reported and dict(zip(("defaults", "chosen"), map(figures, self.reported), strict=True))
        return {
            "trials": [trial.to_dict() for trial in self.trials],
            "facts": dict(zip(("choosing", "reporting", "left_out"), self.facts, strict=True)),
            "reported": reported,
            "better": self.better,
            "complete": self.complete,
            "seconds": self.seconds,
        }

    def preset(self) -> PresetFile:
        """The preset file: every setting, since defaults may change, and what was measured, without times."""
        measured: dict[str, Any] = {
            "facts": dict(zip(("choosing", "reporting", "left_out"), map(str, self.facts), strict=True)),
            "complete": "yes" if self.complete else "no",
            "trials": [_texts(trial.to_dict()) for trial in self.trials],
        }
        if self.reported is not None:
            before, after = self.reported
            measured["reported"] = {"defaults": _texts(figures(before)), "chosen": _texts(figures(after))}
        numbers = {name: str(value) for name, value in self.setting.hyper.to_dict().items()}
        return PresetFile(
            METHOD, self.model, self.setting.hyper.layers, numbers, self.setting.wordings, self.notes(), measured
        )

    def notes(self) -> str:
        """What was found, in a sentence or two."""
        changed = [f"{trial.what} {trial.value}" for trial in self.trials if trial.chosen]
        first = f"chose {', '.join(changed)}" if changed else "found nothing better than the defaults"
        told = f"kpatch tune {first}."
        if self.better is not None:
            told += " The half of the pilot facts that did not choose " + ("agrees." if self.better else "does not.")
        return told


def _texts(row: dict[str, Any]) -> dict[str, str]:
    return {
        key: ("yes" if value else "no") if isinstance(value, bool) else str(value)
        for key, value in row.items()
        if value is not None
    }


def tune(
    model: Model,
    *,
    minutes: float | None = None,
    quick: bool = False,
    seed: int = 0,
    memory: int | None = None,
    resume: bool = True,
    report: Reporter = SILENT,
) -> Tuned:
    """Find settings of MEMIT for `model` by pilot edits of built-in facts.

    With `quick` only R is chosen, among three ranges, by one edit of eight facts each. No trial is begun that is not
    expected to end within `minutes` (default 30; quick: 3), but the defaults are always measured. Verdicts are kept
    in the cache as they come, so that an interrupted search goes on where it was; `resume` False ignores them.
    `memory` is the bytes that activations may take. Raises BadInput for a model that memit cannot edit.
    """
    limit = 60 * (minutes if minutes is not None else QUICK_MINUTES if quick else MINUTES)
    budget = bytes_given(memory, DEFAULT_BUDGET, "memory")
    return _Search(model, limit, quick, Inputs(seed=seed, budget=budget, resume=resume, report=report)).run()


class _Search:
    def __init__(self, model: Model, limit: float, quick: bool, inputs: Inputs) -> None:
        self.started = time.monotonic()
        self.model, self.limit, self.quick, self.inputs, self.report = model, limit, quick, inputs, inputs.report
        self.method = method_named(METHOD)
        self.default = Setting(hyper_for(self.method, model, None, {}), "auto")
        self.longest = 0.0  # seconds of one trial
        self.trials: list[Trial] = []

    def run(self) -> Tuned:
        pilots = pilots_for(self.model, self.report)
        choosing = pilots.choosing[:_QUICK_FACTS] if self.quick else pilots.choosing
        judge = Judge(self.model, self.method, choosing)
        self.setting, self.best = self.default, self._judged(judge, self.default, "the defaults")
        layers = ranges(self.default.hyper.layers)
        self._add(Trial("layers", layers, "the default, with all other defaults", self.best, False, "the start"))
        for candidates in (self._layers,) if self.quick else (self._layers, self._numbers, self._words):
            for what, value, origin, setting in candidates():
                self._try(judge, what, value, origin, setting)
        reported = None if self.quick else self._reported(pilots.reporting)
        return Tuned(
            model=self._tuned_on(),
            default=self.default,
            setting=self.setting,
            trials=self.trials,
            facts=(len(choosing), 0 if self.quick else len(pilots.reporting), pilots.left_out),
            reported=reported,
            complete=all(trial.verdict is not None for trial in self.trials) and (self.quick or reported is not None),
            seconds=time.monotonic() - self.started,
        )

    # What is tried

    def _layers(self) -> Iterator[tuple[str, str, str, Setting]]:
        base = self.default.hyper.layers
        names = QUICK if self.quick else tuple(DEPTHS)
        tried = {base}
        for one in self._ranges(names):
            if one.layers not in tried:
                tried.add(one.layers)
                setting = Setting(replace(self.setting.hyper, layers=one.layers), self.setting.wordings)
                yield "layers", ranges(one.layers), one.why, setting

    def _ranges(self, names: tuple[str, ...]) -> Iterator[LayersToTry]:
        count, editable, base = self.model.n_layers, self.model.editable, self.default.hyper.layers
        yield from by_depth(count, editable, names, base)
        traced = [] if self.quick else self._traced()
        if traced:
            yield from by_trace(traced, count, editable, base)

    def _traced(self) -> list[int]:
        """R by a quick trace of built-in facts; empty where it finds none, or where there is no time for it."""
        if self._left() < (1 + _TRACE_COSTS) * self.longest:
            self.report.note("no trace is made: the time left is for edits")
            return []
        try:
            traces = trace(
                self.model,
                limit=_TRACED,
                settings=TraceSettings(quick=True, seed=self.inputs.seed),
                resume=self.inputs.resume,
                report=self.report,
            )
        except CheckFailed as error:
            self.report.note(f"a trace says nothing: {error.message}")
            return []
        found = Summary(traces).range
        if found is None:
            self.report.note("a trace finds no layers: MLPs carry too little of the facts")
        return [] if found is None else found.layers

    def _numbers(self) -> Iterator[tuple[str, str, str, Setting]]:
        for name, values in NUMBERS.items():
            default = getattr(self.default.hyper, name)
            for value in values:
                if float(value) != default:
                    hyper = with_settings(self.setting.hyper, {name: value})
                    yield name, value, f"the default is {default:g}", Setting(hyper, self.setting.wordings)

    def _words(self) -> Iterator[tuple[str, str, str, Setting]]:
        for wordings in WORDINGS:
            yield "wordings", wordings, "the default is auto", Setting(self.setting.hyper, wordings)

    # How it is tried

    def _try(self, judge: Judge, what: str, value: str, origin: str, setting: Setting) -> None:
        kept = kept_verdict(judge, setting, self.inputs) if self.inputs.resume else None
        if kept is None and self._left() < self.longest:
            return self._add(Trial(what, value, origin, None, False, "not tried: time is up"))
        verdict = kept or self._judged(judge, setting, f"{what} {value}")
        chosen, reason = compare(verdict, self.best)
        if chosen:
            self.setting, self.best = setting, verdict
        self._add(Trial(what, value, origin, verdict, chosen, reason))

    def _judged(self, judge: Judge, setting: Setting, called: str) -> Verdict:
        """The verdict, from the cache or by an edit, which is then kept."""
        kept = kept_verdict(judge, setting, self.inputs) if self.inputs.resume else None
        if kept is not None:
            return kept
        began = time.monotonic()
        with self.report.task(f"Trying {called}: one edit of {counted(len(judge.facts), 'fact')}"):
            inputs = replace(self.inputs, seconds={})
            verdict = judge.judge(setting, inputs)
        keep(judge, setting, self.inputs, verdict)
        once = inputs.seconds.get("covariance", 0.0)  # of layers that are new
        self.longest = max(self.longest, time.monotonic() - began - once)
        return verdict

    def _reported(self, facts: tuple[Fact, ...]) -> tuple[Verdict, Verdict] | None:
        """The other half with the defaults and with what was chosen."""
        judge = Judge(self.model, self.method, facts)
        found = []
        for setting, called in ((self.default, "the defaults"), (self.setting, "what was chosen")):
            found.append(self._judged(judge, setting, f"{called} on the other half"))
        return found[0], found[1]

    def _left(self) -> float:
        """Seconds for trials; two edits of the reporting half come after them."""
        after = 0.0 if self.quick else 2 * self.longest
        return self.limit - after - (time.monotonic() - self.started)

    def _add(self, trial: Trial) -> None:
        self.trials.append(trial)
        if trial.verdict is not None:
            said = "taken" if trial.chosen else "left"
            said = f"{said}: {trial.reason}" if len(self.trials) > 1 else f"Score {100 * trial.verdict.score:.1f}"
            self.report.note(f"{trial.what} {trial.value} ({trial.origin}): {said}")

    def _tuned_on(self) -> TunedOn:
        model = self.model
        weights = weights_fingerprint(model, self.report)
        return TunedOn(model.name, model.family.model_type, model.width, model.n_layers, weights)
