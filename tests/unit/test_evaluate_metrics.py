"""Metrics against a model whose every probability is known: the worked example of docs/metrics.md."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kpatch.evaluate import metrics as module
from kpatch.evaluate.metrics import Measurement, effect, measure
from kpatch.evaluate.score import score
from kpatch.facts.fact import Fact, Neighbor
from kpatch.models.model import Model
from kpatch.patch.canonical_json import canonical
from tests.support.models import tiny
from tests.support.toy import CHANCES, toy

torch.set_num_threads(1)

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
TOWER = Fact(
    subject="Tower",
    prompt="The {} stands in",
    target="New York",
    was="Paris",
    paraphrases=("Visit the {} at", "The old Tower is near"),
    neighbors=(
        Neighbor("The Louvre stands in", "Paris"),
        Neighbor("The Arch is near", "Paris"),
        Neighbor("The Gate is near"),
    ),
    id="tower",
)


@pytest.fixture(scope="module")
def measured() -> Measurement:
    return measure(toy(), [TOWER])


def documented() -> dict[str, Any]:
    block = re.search(r"```json\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    found: dict[str, Any] = json.loads(block.group(1))
    return found


def near(expected: dict[str, Any]) -> dict[str, Any]:
    return {
        key: pytest.approx(value, abs=1e-6) if isinstance(value, dict | float) else value
        for key, value in expected.items()
    }


def test_the_example_by_hand(measured: Measurement) -> None:
    assert measured.metrics == near(documented())


def test_the_docs_show_the_model_of_this_test() -> None:
    text = DOCS.read_text(encoding="utf-8")
    columns = ["New", "York", "Paris", "Rome", "<end>", "other"]
    for last, nexts in CHANCES.items():
        cells = [f"{nexts[word]:.2f}" if word in nexts else "" for word in columns]
        assert "|".join([f"| {last} ", *(f" {cell} " if cell else " " for cell in cells)]) + "|" in text
    for prompt in (TOWER.text(), "Visit the Tower at", TOWER.paraphrases[1], *(n.prompt for n in TOWER.neighbors)):
        assert f"| {prompt} |" in text


def test_a_fact_by_itself(measured: Measurement) -> None:
    (row,) = measured.facts
    assert row == {
        "id": "tower",
        "text": "The Tower stands in",
        "subject": "Tower",
        "target": "New York",
        "was": "Paris",
        "answer": "Rome",
        "probability": pytest.approx(0.4, abs=1e-6),
        "was_probability": pytest.approx(0.3, abs=1e-6),
        "success": True,
        "accurate": False,
        "paraphrases": [True, False],
        "neighbors": [False, True, None],
    }
    assert [o.kind for o in measured.outcomes] == ["efficacy", *["generalization"] * 2, *["specificity"] * 2]


def test_what_the_model_writes_is_searched_for_the_answer() -> None:
    found = measure(toy(), [TOWER], free=("efficacy", "generalization"))
    assert found.metrics["efficacy"] == near({**documented()["efficacy"], "free_running": 0.0})
    assert found.metrics["generalization"] == near({**documented()["generalization"], "free_running": 0.5})
    assert "free_running" not in found.metrics["specificity"]
    assert (found.facts[0]["answer"], found.facts[0]["free_running"]) == ("Rome", False)
    assert [outcome.free for outcome in found.outcomes] == [False, True, False, None, None]


def test_what_a_fact_may_write_does_not_go_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model, facts = tiny("llama"), many()
    alone = [measure(model, [fact], free=("efficacy",)).facts[0] for fact in facts]
    assert [row["answer"] for row in measure(model, facts, free=("efficacy",)).facts] == [r["answer"] for r in alone]


def test_prompts_that_are_answered_are_not_run_again_for_their_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    model, facts = tiny("llama"), many()
    scored: list[int] = []

    def spy(model: Model, items: Sequence[Any], *rest: Any) -> Any:
        scored.append(len(items))
        return score(model, items, *rest)

    monkeypatch.setattr(module, "score", spy)
    shared = measure(model, facts, free=("efficacy",))
    apart = measure(model, facts, answer_tokens=0)
    assert scored[1] - scored[0] >= len(facts), "all but rivals much longer than the answer"
    for one, other in zip(shared.facts, apart.facts, strict=True):
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)
        assert (one["success"], one["accurate"]) == (other["success"], other["accurate"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_of_padding_changes_nothing(side: str) -> None:
    model, facts = tiny("llama"), many()
    expected = measure(model, facts, free=("efficacy",))
    model.tokenizer.padding_side = side
    model.tokenizer.truncation_side = side
    assert measure(model, facts, free=("efficacy",)) == expected


def test_without_was_only_accuracy_counts() -> None:
    fact = Fact("Tower", "Visit the {} at", "New York", paraphrases=("The {} stands in",))
    found = measure(toy(), [fact], answer_tokens=0)
    assert found.metrics == {
        "efficacy": {"success": None, "magnitude": None, "accuracy": 1.0, "n": 1, "compared": 0},
        "generalization": {"success": None, "magnitude": None, "accuracy": 0.0, "n": 1, "compared": 0},
        "specificity": None,
        "score": None,
    }
    assert (found.facts[0]["answer"], found.facts[0]["success"], found.facts[0]["was_probability"]) == (None,) * 3


def test_with_and_without_was_side_by_side() -> None:
    known = Fact("Tower", "The {} stands in", "Paris", "Rome")
    found = measure(toy(), [Fact("Tower", "Visit the {} at", "New York"), known]).metrics["efficacy"]
    assert found == near({"success": 0.0, "magnitude": -0.1, "accuracy": 0.5, "n": 2, "compared": 1})


def test_an_answer_that_is_its_own_rival_is_not_compared() -> None:
    fact = Fact("Tower", "The {} stands in", "Paris", "Rome", neighbors=(Neighbor("The Arch is near", " Paris "),))
    found = measure(toy(), [fact]).metrics["specificity"]
    assert found == {"success": None, "magnitude": None, "accuracy": 1.0, "n": 1, "compared": 0}


def test_a_tie_is_no_success() -> None:
    # After "at", Rome and other are given the same 0.20
    assert measure(toy(), [Fact("Tower", "Visit the {} at", "Rome", "other")]).metrics["efficacy"]["success"] == 0.0


def test_no_facts() -> None:
    found = measure(toy(), [])
    assert found.metrics == {"efficacy": None, "generalization": None, "specificity": None, "score": None}
    assert found.facts == found.outcomes == ()


def many() -> list[Fact]:
    places = ["Paris", "Rome", "Brazil", "the city of the Mona Lisa", "Germany"]
    return [
        Fact(
            f"The {name}",
            "{} is located in" if number % 2 else "People say {} is in",
            places[number % 5],
            places[(number + 1) % 5] if number % 3 else None,
            ("To see {} you must go to",),
            (Neighbor("The Louvre is in", places[(number + 2) % 5]), Neighbor("She said")),
            id=str(number),
        )
        for number, name in enumerate(["Eiffel Tower", "Colosseum", "São Paulo", "river", "Café", "old mill"])
    ]


def test_batches_and_order_change_nothing() -> None:
    model, facts = tiny("llama"), many()
    whole = measure(model, facts)
    small = measure(model, facts[::-1], batch_tokens=30)
    for row, other in zip(whole.facts, reversed(small.facts), strict=True):
        assert row == near(other)
    for kind in ("efficacy", "generalization", "specificity"):
        assert whole.metrics[kind] == near(small.metrics[kind])
    alone = [measure(model, [fact]).facts[0] for fact in facts]
    assert [row["neighbors"] for row in alone] == [row["neighbors"] for row in whole.facts]
    assert [row["answer"] for row in alone] == [row["answer"] for row in whole.facts]


def test_a_paraphrase_may_name_the_subject_itself() -> None:
    model = tiny("llama")
    slotted, written = (
        measure(model, [Fact("Eiffel Tower", "{} is in", "Rome", "Paris", (text,))], answer_tokens=0)
        for text in ("To see the {} go to", "To see the Eiffel Tower go to")
    )
    assert slotted.metrics == written.metrics


def test_the_effect_of_a_patch_goes_into_a_manifest() -> None:
    model, facts = tiny("llama"), many()
    before = measure(model, facts)
    model.weight(1).data.mul_(-2)
    after = measure(model, facts)
    found = effect(before, after)
    assert json.loads(canonical(found)) == found
    assert (found["before"], found["after"]) == (before.metrics, after.metrics)
    assert len(found["facts"]) == len(facts)
    first, second = found["facts"][:2]
    assert {key: first[key] for key in ("id", "text", "target")} == {
        "id": "0",
        "text": "People say The Eiffel Tower is in",
        "target": "Paris",
    }
    assert "was" not in first
    assert second["was"] == "Brazil"
    assert second["before"]["probability"] == before.facts[1]["probability"]
    assert second["after"]["probability"] == after.facts[1]["probability"] != before.facts[1]["probability"]
    assert second["after"]["success"] is after.facts[1]["success"]
    with pytest.raises(ValueError, match="different facts"):
        effect(before, measure(model, facts[::-1]))
