"""The judge: its formula by hand, its measurements beside `measure`, and a model that it leaves alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from kpatch.edit.methods import Edit, Inputs, Method, hyper_for, method_named
from kpatch.edit.presets import HyperParams
from kpatch.edit.weights import add, restored
from kpatch.evaluate.metrics import measure
from kpatch.facts.fact import Fact
from kpatch.models.model import Model
from kpatch.patch.delta import Dense
from kpatch.tune.judge import Judge, Setting, Verdict, compare
from kpatch.tune.pilots import every_pilot
from tests.support.models import tiny

pytestmark = pytest.mark.usefixtures("shared_statistics")

SOME = every_pilot()[:3]


@dataclass(frozen=True, slots=True)
class NoiseHyper(HyperParams):
    """size  of every entry"""

    size: float = 0.1


class Noise(Method):
    """Not an edit but a change that is quick to make."""

    name = "noise"
    hyper = NoiseHyper

    def edit(self, model: Model, facts: Sequence[Fact], hyper: NoiseHyper, inputs: Inputs) -> Edit:
        self.wordings = [fact.wordings for fact in facts]
        weight = model.weight(hyper.layers[0])
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        return Edit({model.weight_name(hyper.layers[0]): Dense(hyper.size * noise)}, hyper.layers)


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    torch.set_num_threads(1)
    made = tiny("llama")
    before = {name: tensor.clone() for name, tensor in made.net.state_dict().items()}
    yield made
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.net.state_dict().items())


def verdict(**changed: Any) -> Verdict:
    plain = Verdict(1.0, 0.5, 0.5, target=-1.0, right=-0.5, drift=0.1, gains=(-1.0, -2.0))
    return replace(plain, **changed)


# The formula


def test_the_score_is_the_harmonic_mean() -> None:
    assert verdict().score == pytest.approx(3 / (1 + 2 + 2))
    assert verdict(neighbors=0.0).score == 0.0


def test_the_higher_score_wins_whatever_the_log_probabilities() -> None:
    better, worse = verdict(paraphrases=0.6, gains=(-9.0, -9.0)), verdict()
    assert compare(better, worse) == (True, "Score 64.3 against 60.0")
    assert compare(worse, better) == (False, "Score 60.0 against 64.3")


@pytest.mark.parametrize(
    ("gains", "drift", "taken", "said"),
    [
        ((-0.5, -1.5), 0.1, True, "a near tie; log-probabilities +0.50 ± 0.00"),
        ((-0.5, -1.5), 0.7, False, "a near tie; log-probabilities -0.10 ± 0.00"),
        ((0.0, -2.5), 0.1, False, "a near tie; log-probabilities +0.25 ± 0.75"),
        ((-1.0, -2.0), 0.1, False, "a near tie; log-probabilities +0.00 ± 0.00"),
    ],
)
def test_log_probabilities_decide_near_ties(gains: tuple[float, float], drift: float, taken: bool, said: str) -> None:
    """They have to gain more than their standard error over facts; the same once more changes nothing."""
    found, reason = compare(verdict(gains=gains, drift=drift), verdict())
    assert found is taken
    assert reason == f"Score 60.0 against 60.0, {said}"


def test_a_verdict_is_kept_as_json() -> None:
    assert Verdict.from_dict(verdict().to_dict()) == verdict()
    with pytest.raises(KeyError):
        Verdict.from_dict({"efficacy": 1})


# The measurements


def test_it_measures_what_evaluation_measures(model: Model) -> None:
    method = Noise()
    setting = Setting(NoiseHyper((1,), 0.3), "none")
    found = Judge(model, method, SOME).judge(setting, Inputs())
    before = measure(model, SOME, answer_tokens=0)
    edit = method.edit(model, SOME, setting.hyper, Inputs())
    with restored(model, edit.deltas):
        for name, delta in edit.deltas.items():
            add(model, name, delta)
        after = measure(model, SOME, answer_tokens=0).metrics
    names = {"efficacy": "efficacy", "paraphrases": "generalization", "neighbors": "specificity"}
    for own, theirs in names.items():
        assert getattr(found, own) == pytest.approx(after[theirs]["success"])
    assert before.metrics != after, "the change is felt"
    assert found.drift > 0
    assert found.target + found.right == pytest.approx(sum(found.gains) / len(found.gains))


def test_no_change_costs_neighbors_nothing(model: Model) -> None:
    found = Judge(model, Noise(), SOME).judge(Setting(NoiseHyper((1,), 0.0), "none"), Inputs())
    assert found.right == 0.0
    assert found.drift == 0.0
    assert found.target < 0


def test_facts_come_with_the_settings_wordings(model: Model) -> None:
    method = Noise()
    judge = Judge(model, method, SOME)
    for wordings, count in (("none", 0), ("auto", 3)):
        judge.judge(Setting(NoiseHyper((1,), 0.0), wordings), Inputs())
        assert [len(texts) for texts in method.wordings] == [count] * len(SOME)


def test_the_statements_are_about_other_subjects_that_nothing_holds(model: Model) -> None:
    from kpatch.stats.subject_keys import told

    texts = Judge(model, Noise(), every_pilot()).texts
    assert len(texts) == 48
    named = " ".join(fact.text() + (fact.was or "") for fact in every_pilot())
    assert not {text.subject for text in texts} & {name for _, name in told()}
    assert [text.subject for text in texts if text.subject in named] == []


def test_memit_learns_the_pilots(model: Model, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KPATCH_CACHE", str(tmp_path))
    method = method_named("memit")
    # To a random model other words mean nothing, so that the prompt stands for its paraphrase
    judge = Judge(model, method, [replace(fact, paraphrases=(fact.prompt,)) for fact in SOME])
    hyper = hyper_for(method, model, [1, 2], {"steps": "6", "leverage": "500"})
    inputs = Inputs(tokens=400)
    learned, none = (judge.judge(Setting(each, "none"), inputs) for each in (hyper, replace(hyper, leverage=1e-9)))
    assert none.drift == pytest.approx(0, abs=1e-6)
    assert none.right == pytest.approx(0, abs=1e-4)
    assert learned.target > none.target
    assert learned.drift > 1e-4
