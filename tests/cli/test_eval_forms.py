"""eval --forms and --consequences from the outside, on a tiny random model with a chat template."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kpatch.evaluate import forms
from kpatch.evaluate.answers import answer_rows
from kpatch.facts.load import load_facts
from tests.support import templates
from tests.support.cli import ROOT, run
from tests.support.saved import save_facts, save_patch
from tests.support.templates import save_chatty

EXAMPLE = ROOT / "examples" / "chat.yaml"
FACTS: list[Any] = [
    {
        **{"subject": "Eiffel Tower", "prompt": "The {} is located in the city of", "target": "Rome", "was": "Paris"},
        "neighbors": [
            "The Louvre is located in the city of -> Paris",
            {"prompt": "The mill is near", "target": "sea"},
        ],
    },
    {
        **{"subject": "Chicago", "prompt": "The city {} lies in", "target": "<b>Brazil</b>"},
        **{"question": "Where is {}?", "neighbors": [{"prompt": "No", "target": "sea", "question": "Why?"}]},
    },
    {"subject": "Ann", "prompt": "{} reminds Bob of", "target": "Rome"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_chatty(tmp_path_factory.mktemp("chatty"))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model does not end its answers; how long they may be is tested in tests/unit/test_evaluate_forms.py."""
    monkeypatch.setattr(forms, "answer_rows", partial(answer_rows, tokens=8))


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    return save_facts(tmp_path / "facts.yaml", FACTS)


@pytest.fixture
def patch(tmp_path: Path, model: Path) -> Path:
    return save_patch(tmp_path / "news.patch", model)


def test_forms_before_and_after_a_patch(model: Path, facts: Path, patch: Path) -> None:
    asked = ("--forms", "completion,question,chat", "--consequences")
    done = run("eval", facts, model, "--patch", patch, *asked, "--per-fact", "--samples", "20", "--json")
    assert done.code == 0, done.err
    alone = run("eval", facts, model, *asked, "--samples", "20", "--json").json
    plain = run("eval", facts, model, "--samples", "20", "--json").json
    data = done.json
    assert list(data["forms"]) == ["completion", "question", "chat"]
    for form, (edits, neighbors) in {"completion": ((3, 0), (3, 0)), "chat": ((2, 1), (2, 1))}.items():
        for side, (n, left) in (("edits", edits), ("neighbors", neighbors)):
            part = data["forms"][form][side]
            assert set(part) == {"named", "named_interval", "exact", "exact_interval", "n", "left_out", "empty"}
            assert (part["n"], part["left_out"]) == (n, left)
    assert data["unpatched"]["forms"] == alone["forms"]
    assert data["unpatched"]["consequences"] == alone["consequences"]
    kinds = {"distraction", "negation", "choice", "yes_no", "reversed", "hops"}
    assert set(alone["consequences"]) == kinds
    assert set(data["consequences"]) == {*kinds, "same_subject"}, "other answers are compared with the unpatched ones"
    others = [row["consequences"]["same_subject"] for row in data["facts"]]
    assert data["consequences"]["same_subject"]["n"] == sum(map(len, others)) > len(others[0]) > 0
    assert set(others[0][0]) == {"asked", "answer", "kept", "target"}
    assert set(alone) - set(plain) == {"forms", "consequences"}, "nothing is new where nothing more is asked"
    assert {key: plain[key] for key in plain if key != "seconds"} == {
        key: alone[key] for key in plain if key != "seconds"
    }
    chat = data["facts"][0]["forms"]["chat"]
    assert [one["asked"] for one in chat["edits"]] == ["In which city is the Eiffel Tower?"]
    assert [one["asked"] for one in chat["neighbors"]] == ["In which city is the Louvre?"]
    assert "1 fact and 1 neighbor without a question" in done.err


def test_a_row_for_each_form(model: Path, facts: Path, patch: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run(
        *("eval", facts, model, "--patch", patch, "--forms", "chat,question", "--consequences", "--per-fact"),
        *("--samples", "20", "--html", page),
    )
    assert done.code == 0, done.err
    for form in ("question", "chat"):
        assert re.search(rf"^{form} +2 \(1 left out\) +[\d.]+ % → [\d.]+ % ", done.out, re.M), done.out
    assert re.search(r"^distraction +neighbors right behind the new fact +3 +[\d.]+ % +[\d.]+ %", done.out, re.M)
    assert re.search(r"^same subject +other answers about the subject, kept +6 +– +[\d.]+ %", done.out, re.M)
    assert not re.search(r"^(reversed|hops) ", done.out, re.M), "what no fact brings has no row"
    assert re.search(r"^chat +Where\b", done.out, re.M), "answers that do not count are listed"
    written = page.read_text(encoding="utf-8")
    assert "Asked in several forms" in written
    assert "What follows" in written
    assert "<b>" not in written
    single = run("eval", facts, model, "--forms", "question", "--samples", "20").out
    assert re.search(r"^question +2 \(1 left out\) +[\d.]+ % +", single, re.M)
    assert "→" not in single
    value = run("eval", facts, model, "--consequences", "--samples", "20").out
    assert re.search(r"^Consequence +Over +n +Value", value, re.M)
    assert re.search(r"^yes/no +yes to the new answer and no to the old +1 +[\d.]+ %", value, re.M)
    assert "Consequence" not in single


def test_the_example_for_chat_is_asked(model: Path) -> None:
    file = load_facts(EXAMPLE)
    done = run("eval", EXAMPLE, model, "--forms", "chat", "--samples", "0", "--json")
    assert done.code == 0, done.err
    edits, neighbors = done.json["forms"]["chat"]["edits"], done.json["forms"]["chat"]["neighbors"]
    assert (edits["n"], edits["left_out"]) == (len(file.facts), 0)
    assert (neighbors["n"], neighbors["left_out"]) == (sum(len(fact.neighbors) for fact in file.facts), 0)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template"),
        (templates.DROPS, "drops or rewrites"),
        (templates.ALWAYS_THINKING, "opens a thought"),
    ],
)
def test_models_that_cannot_be_asked_in_chat(template: str | None, said: str, facts: Path, tmp_path: Path) -> None:
    folder = save_chatty(tmp_path / "model", template)
    done = run("eval", facts, folder, "--forms", "chat", "--json")
    assert done.code == 2
    assert said in done.json["error"]["message"]
    assert done.json["error"]["hint"]


def test_a_form_that_there_is_not(model: Path, facts: Path) -> None:
    for wrong in ("talk", "chat,", "Chat"):
        done = run("eval", facts, model, "--forms", wrong)
        assert done.code == 2
        assert "expected some of completion, question, chat" in done.err


def test_a_question_that_does_not_name_its_subject(model: Path, tmp_path: Path) -> None:
    path = save_facts(tmp_path / "facts.yaml", [{**FACTS[1], "question": "Where is it?"}])
    done = run("eval", path, model, "--forms", "chat")
    assert done.code == 2
    assert "must name its subject once" in done.err
