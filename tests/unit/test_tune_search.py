"""The search: what it tries, in which order, what it takes, when it stops, and what it leaves in the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kpatch.edit.preset_file import read_preset
from kpatch.models.model import Model
from kpatch.tune import pilots, search
from kpatch.tune.candidates import DEPTHS, NUMBERS, QUICK, by_depth, by_trace
from kpatch.tune.judge import Judge, Setting, Verdict
from kpatch.tune.search import tune
from tests.support.models import tiny
from tests.support.reports import Recorder

pytestmark = pytest.mark.usefixtures("shared_statistics")

FLAT = Verdict(1.0, 0.5, 0.5, target=-1.0, right=-0.5, drift=0.1, gains=())


class Told:
    """Stands for the edits: a Score for every setting, and which settings were tried."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tried: list[Setting] = []
        self.stop_after: int | None = None
        self.clock = 0.0
        monkeypatch.setattr(Judge, "judge", lambda judge, setting, inputs: self.judge(judge, setting))
        monkeypatch.setattr(pilots, "_known", lambda model, facts: frozenset(fact.id for fact in facts))
        monkeypatch.setattr(search._Search, "_traced", lambda found: [2])
        monkeypatch.setattr(search.time, "monotonic", lambda: self.clock)

    def worth(self, hyper: Any, wordings: str) -> float:
        """Paraphrases: best with layers up to 4, leverage 3.5 and clamp 1.5."""
        found = 0.3 + 0.2 * (max(hyper.layers) == 4) + 0.1 * (hyper.leverage == 3.5)
        return found + 0.1 * (hyper.clamp == 1.5) - 0.1 * (wordings == "none")

    def judge(self, judge: Judge, setting: Setting) -> Verdict:
        if self.stop_after is not None and len(self.tried) >= self.stop_after:
            raise KeyboardInterrupt
        self.tried.append(setting)
        self.clock += 60.0
        gains = (-1.5,) * len(judge.facts)
        return replace(FLAT, paraphrases=self.worth(setting.hyper, setting.wordings), gains=gains)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.set_num_threads(1)
    return tiny("llama", num_hidden_layers=12)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Told:
    monkeypatch.setenv("KPATCH_CACHE", str(tmp_path / "cache"))
    return Told(monkeypatch)


# Candidates


def test_ranges_by_depth() -> None:
    found = by_depth(30, range(30), tuple(DEPTHS), range(2, 15))
    assert [(one.layers[0], one.layers[-1]) for one in found] == [(1, 10), (5, 17), (4, 10), (1, 20)]
    assert found[0].why == "lower: 3 % to 33 % of the depth"


def test_ranges_leave_out_what_cannot_be_edited_and_what_is_the_same() -> None:
    assert by_depth(4, range(4), tuple(DEPTHS), (1, 2)) == by_depth(4, range(4), ("lower", "wider"), (1, 2))[:1]
    assert by_depth(30, (), tuple(DEPTHS), ()) == []
    (one,) = by_depth(30, (3, 5), ("lower",), (2,))
    assert one.layers == (3, 5)


@pytest.mark.parametrize(
    ("traced", "around"), [([6, 7], (4, 9)), ([0], (0, 5)), ([27, 28], (23, 28)), ([5, 6, 7, 8], (4, 9))]
)
def test_ranges_by_a_trace(traced: list[int], around: tuple[int, int]) -> None:
    own, wide = by_trace(traced, 30, range(30), range(10, 16))
    assert own.layers == tuple(traced)
    assert (wide.layers[0], wide.layers[-1], len(wide.layers)) == (*around, 6)


# The search


def test_each_number_is_tried_with_the_best_before_it(model: Model, told: Told) -> None:
    report = Recorder()
    found = tune(model, minutes=1000, report=report)
    assert max(found.setting.hyper.layers) == 4
    assert (found.setting.hyper.leverage, found.setting.hyper.clamp, found.setting.wordings) == (3.5, 1.5, "auto")
    assert [trial.what for trial in found.trials if trial.chosen] == ["layers", "leverage", "clamp"]
    names = [trial.what for trial in found.trials]
    assert list(dict.fromkeys(names)) == ["layers", *NUMBERS, "wordings"]
    assert names.count("leverage") == 4
    assert found.complete
    assert found.reported is not None
    assert found.better is True
    assert any(note.startswith("leverage 3.5 (the default is 2.5): taken: Score") for note in report.notes)
    assert "that did not choose agrees" in found.notes()


def test_quick_tries_three_ranges_on_eight_facts(model: Model, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    plain = told.judge
    monkeypatch.setattr(told, "judge", lambda judge, setting: counts.append(len(judge.facts)) or plain(judge, setting))
    found = tune(model, quick=True, minutes=1000)
    assert counts == [8] * (1 + len(QUICK))
    assert max(found.setting.hyper.layers) == 4
    assert (found.reported, found.better, found.complete) == (None, None, True)


def test_what_loses_is_left(model: Model, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(told, "worth", lambda hyper, wordings: 0.5)
    found = tune(model, minutes=1000)
    assert found.setting == found.default
    assert [trial for trial in found.trials if trial.chosen] == []
    assert "found nothing better than the defaults" in found.notes()
    assert found.better is None


def test_nothing_is_begun_that_would_end_too_late(model: Model, told: Told) -> None:
    """Every edit takes a minute: one for the defaults, three more, two to report."""
    found = tune(model, minutes=6.5)
    assert len(told.tried) == 1 + 3 + 2
    untried = [trial for trial in found.trials if trial.verdict is None]
    assert {trial.reason for trial in untried} == {"not tried: time is up"}
    assert not found.complete
    assert found.preset().measured["complete"] == "no"


def test_an_interrupted_search_goes_on_where_it_was(model: Model, told: Told) -> None:
    whole = tune(model, minutes=1000, seed=1)
    told.tried.clear()
    told.stop_after = 5
    with pytest.raises(KeyboardInterrupt):
        tune(model, minutes=1000)
    assert len(told.tried) == 5
    told.stop_after = None
    again = tune(model, minutes=1000)
    settings = [(setting.hyper, setting.wordings) for setting in told.tried]
    choosing = len(again.trials)
    assert len(settings) == choosing + 2, "nothing is tried twice"
    assert again.preset().text() == whole.preset().text()
    tune(model, minutes=0)
    assert len(told.tried) == len(settings), "all is kept"
    tune(model, minutes=1000, resume=False)
    assert len(told.tried) == 2 * len(settings)


def test_the_preset_says_all_and_is_read_back(model: Model, told: Told, tmp_path: Path) -> None:
    found = tune(model, minutes=1000)
    path = tmp_path / "tiny.preset.yaml"
    path.write_text(found.preset().text(), encoding="utf-8")
    preset = read_preset(path)
    assert preset == found.preset()
    assert preset.layers == found.setting.hyper.layers
    assert set(preset.settings) == set(found.setting.hyper.to_dict())
    assert (preset.model.depth, preset.model.family, len(str(preset.model.weights))) == (12, "llama", 64)
    assert len(preset.measured["trials"]) == len(found.trials)
    assert "seconds" not in path.read_text(encoding="utf-8")
