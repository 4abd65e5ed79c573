"""Wordings that the model itself gives: what is kept of them, and that the same seed gives the same ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kpatch.edit import asked_wordings
from kpatch.edit.asked_wordings import ask_for_wordings
from kpatch.facts.fact import Fact
from tests.support.models import tiny
from tests.support.reports import Recorder

FACT = Fact("Bo", "The zorb of {} is", "Rome", was="Paris", paraphrases=("Bo has its zorb in",))
UNSAID = Fact("Bo", "The zorb of {} is", "Rome")


def model_that(
    monkeypatch: pytest.MonkeyPatch, answers: Callable[[str], str], says: Sequence[str]
) -> Callable[..., tuple[Fact, ...]]:
    """`ask_for_wordings` of a model that answers prompts so and, asked for other words, says these in turn."""
    said = iter(says)

    def continued(_: Any, prompts: Sequence[str], *args: Any, **options: Any) -> list[str]:
        return [next(said) if "In other words" in prompt else answers(prompt) for prompt in prompts]

    monkeypatch.setattr(asked_wordings, "_continued", continued)
    return lambda fact, heard=None: ask_for_wordings(tiny("llama"), [fact], 2, report=heard or Recorder())


def paris(prompt: str) -> str:
    return " the city of Berlin." if "Berlin" in prompt else " Paris, of course"


@pytest.mark.parametrize("fact", [FACT, UNSAID])
def test_what_is_answered_as_the_prompt_is_is_kept(fact: Fact, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = model_that(
        monkeypatch,
        paris,
        [" Bo, that is in Berlin,\n", " One finds the zorb of Bo in\n\n", " Bo zorbs in\n", " Bo is at\n"],
    )
    heard = Recorder()
    (found,) = ask(fact, heard)
    assert found.wordings == ("One finds the zorb of {} in", "{} zorbs in")
    assert heard.notes == ["1 of 1 facts are learned in wordings of the model's own as well"]


@pytest.mark.parametrize(
    "said",
    [
        " The zorb of bo is\n",  # names the subject otherwise
        " The ZORB of Bo is\n",  # the prompt itself
        " Bo has its zorb in\n",  # asked, so never learned
        " Bo and Bo are in\n",
        " The zorb is in\n",
        " Bo's zorb is Paris, that is\n",  # the old answer stands in it
        " In Rome, Bo is in\n",
        " The zorb of Bo is a thing.\n",
        " The zorb of Bo, which is a thing of which many have said that",  # does not come to an end
        " {} or Bo is\n",
    ],
)
def test_what_is_no_wording_is_left_out(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = model_that(monkeypatch, paris, [said] * 4)
    assert ask(FACT) == (FACT,)


def test_a_model_that_does_not_know_the_old_answer_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_that(monkeypatch, lambda prompt: " Berlin", [])(FACT) == (FACT,)
    assert model_that(monkeypatch, lambda prompt: " a thing that is", [])(UNSAID) == (UNSAID,)


def test_facts_that_bring_wordings_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Fact("Bo", "The zorb of {} is", "Rome", was="Paris", wordings=("{} zorbs in",))
    assert model_that(monkeypatch, paris, [])(own) == (own,)


def test_the_same_seed_gives_the_same_texts() -> None:
    model = tiny("llama")
    once, again, other = (asked_wordings._written(model, [FACT, UNSAID] * 4, seed, Recorder()) for seed in (1, 1, 2))
    assert once == again != other
    assert all(isinstance(text, str) for text in once)
