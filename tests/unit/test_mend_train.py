"""Training of an editor on a tiny model: it learns and ends by itself, an interrupted run ends in the same editor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kpatch.errors import BadInput
from kpatch.facts.fact import Fact
from kpatch.mend import data, train
from kpatch.mend.file import write_editor
from kpatch.mend.network import Network, Settings
from kpatch.mend.places import last_layers, places
from kpatch.mend.rows import Below
from kpatch.reporter import SILENT, Advance
from tests.support.editors import QUICK, training_facts
from tests.support.models import LAYERS, MLP_WIDTH, WIDTH, tiny

pytestmark = pytest.mark.usefixtures("one_thread", "shared_statistics")

SHORT = replace(QUICK, steps=6, validate_every=3)


class Stops:
    """A reporter that ends the training after some steps, as Ctrl-C does, or as a crash that saves nothing."""

    def __init__(self, after: int, error: type[BaseException]) -> None:
        self.left, self.error = after, error

    @contextmanager
    def task(self, description: str, total: int | None = None, unit: str = "") -> Iterator[Advance]:
        def advance(amount: int) -> None:
            self.left -= amount
            if self.left <= 0:
                raise self.error

        yield advance if description == "Training the editor" else lambda amount: None

    def note(self, message: str) -> None:
        return None

    warn = note


def test_the_validation_loss_falls_and_the_best_editor_is_kept() -> None:
    found = train.train(tiny("llama"), training_facts(), QUICK)
    losses = [row["loss"] for row in found.history]
    assert [row["step"] for row in found.history] == [0, 10, 20, 30, 40]
    assert min(losses) < 0.85 * losses[0]
    assert found.history[losses.index(min(losses))]["edit"] < found.history[0]["edit"]
    assert (found.steps, found.facts) == (40, (11, 1))
    assert all(place.layer in (1, 2, 3) for place in found.network.places)


def test_a_covariance_as_the_ridge_is_learned_with_and_kept() -> None:
    hyper = replace(QUICK, regression=1, covariance=1, edits=2)
    found = train.train(tiny("llama"), training_facts(), hyper)
    losses = [row["loss"] for row in found.history]
    assert min(losses) < losses[0]
    for number in range(len(found.network.places)):
        precision = found.network.precision(number)
        assert precision is not None
        assert not torch.equal(precision, torch.eye(len(precision)))


def test_training_ends_when_nothing_gets_better() -> None:
    still = replace(SHORT, learning_rate=0.0, step_rate=0.0, steps=500, validate_every=1, patience=3)
    found = train.train(tiny("llama"), training_facts(), still)
    assert found.steps == 3
    assert found.ended == "no lower validation loss in 3 validations"


def test_time_ends_training_and_more_time_goes_on(tmp_path: Path) -> None:
    model = tiny("llama")
    ended = train.train(model, training_facts(), SHORT, minutes=0.0)
    assert (ended.steps, ended.ended) == (0, "time was up")
    ended.written()
    more = train.train(model, training_facts(), SHORT)
    assert more.steps == SHORT.steps
    assert ended.progress.path is not None
    assert more.progress.path == ended.progress.path


@pytest.mark.parametrize(("error", "regression"), [(KeyboardInterrupt, 0), (MemoryError, 1)])
def test_an_interrupted_run_ends_in_the_same_editor(
    error: type[BaseException], regression: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C saves what was done; a crash leaves what was saved last, here after every step."""
    model, facts = tiny("llama"), training_facts()
    hyper = replace(SHORT, regression=regression, covariance=regression, edits=2 if regression else 1)
    monkeypatch.setenv("KPATCH_CACHE", str(tmp_path / "whole"))
    write_editor(tmp_path / "whole.safetensors", model, train.train(model, facts, hyper).network, {})
    monkeypatch.setenv("KPATCH_CACHE", str(tmp_path / "cut"))
    if error is MemoryError:
        monkeypatch.setattr(train, "_SAVE_EVERY", 0.0)
    for after in (2, 3):
        with pytest.raises(error):
            train.train(model, facts, hyper, report=Stops(after, error))
    found = train.train(model, facts, hyper)
    write_editor(tmp_path / "cut.safetensors", model, found.network, {})
    assert (tmp_path / "cut.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert found.progress.path is not None
    assert found.progress.path.is_file()
    found.written()
    assert not found.progress.path.exists()


def test_damaged_progress_is_begun_again() -> None:
    model, facts = tiny("llama"), training_facts()
    with pytest.raises(KeyboardInterrupt):
        train.train(model, facts, SHORT, report=Stops(4, KeyboardInterrupt))
    whole = train.train(model, facts, SHORT)
    path = whole.progress.path
    assert path is not None
    whole.progress.save()
    path.write_bytes(path.read_bytes()[:-100])
    again = train.train(model, facts, SHORT)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], tensor), name


def test_the_seed_decides() -> None:
    model, facts = tiny("llama"), training_facts()
    hyper = replace(SHORT, steps=2, validate_every=2)
    one, other = (train.train(model, facts, hyper, seed=seed, resume=False).history for seed in (1, 2))
    assert one != other


@pytest.mark.parametrize(
    ("facts", "hyper", "said"),
    [
        ([], SHORT, "too few facts"),
        (training_facts(1), SHORT, "too few facts"),
        (training_facts(), replace(SHORT, edit_rate=1e38), "not finite after 0 steps"),
        (training_facts(), replace(SHORT, regression=3), "regression=3 is neither on nor off"),
        (training_facts(), replace(SHORT, covariance=1), "covariance=1 is a ridge"),
    ],
)
def test_what_training_refuses(facts: list[Fact], hyper: object, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        train.train(tiny("llama"), facts, hyper, report=SILENT)  # type: ignore[arg-type]


def test_nan_in_the_model_is_refused() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.weight(3)[0, 0] = float("nan")
    with pytest.raises(BadInput, match="No text could be sampled"):
        train.train(model, training_facts(), SHORT)


# What it is made of


def test_subjects_of_validation_are_not_trained_on() -> None:
    facts = training_facts() + [replace(fact, prompt="All of {} is in") for fact in training_facts()]
    training, held = data.split(facts, 0)
    assert len(training) + len(held) == len(facts)
    assert not {fact.subject for fact in training} & {fact.subject for fact in held}
    assert data.split(facts, 0) == (training, held)


def test_every_fact_comes_once_before_one_comes_again() -> None:
    model = tiny("llama")
    found = data.Data(tuple(data.learn(model, training_facts(6))), (), ((1, 2, 3),), 2)
    drawn = [question.edit for number in range(6) for question in found.step(number, 4, seed=3)]
    for epoch in range(4):
        assert len(set(drawn[6 * epoch : 6 * epoch + 6])) == 6


def test_an_editor_begins_as_the_identity() -> None:
    model = tiny("llama")
    where = places(model, last_layers(model))
    assert [place.module.rpartition(".")[2] for place in where] == ["gate_proj", "up_proj", "down_proj"] * 3
    assert {place.shape for place in where} == {(WIDTH, MLP_WIDTH), (MLP_WIDTH, WIDTH)}
    assert [place.layer for place in where] == [layer for layer in range(LAYERS - 3, LAYERS) for _ in range(3)]
    network = Network(where, Settings(4, step=0.5))
    u, delta = torch.randn(5, WIDTH), torch.randn(5, MLP_WIDTH)
    read, write = network(0, u, delta)
    torch.testing.assert_close(read, u, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(write, -0.5 * delta, rtol=1e-5, atol=1e-6)


def test_states_are_the_same_bits_kept_or_run_again() -> None:
    model = tiny("llama")
    facts = data.learn(model, training_facts(4))  # two of them have the same neighbor
    rows = [facts[2].edit, facts[0].again[0], facts[1].near[0], facts[3].near[0], facts[0].edit]
    kept, none = (Below(model, 1, budget) for budget in (1 << 20, 0))
    for below in (kept, none):
        for fact in facts:
            below.together(row.ids for row in (fact.edit, *fact.again, *fact.near))
    first = kept.ready(rows).hidden
    assert torch.equal(first, none.ready(rows).hidden)
    assert torch.equal(first, kept.ready(rows).hidden)
    assert kept._kept
    assert not none._kept
