"""Questions on the way from a fact file through `make`: learned in chat form, kept in the patch, shown by `show`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.cli import run
from tests.support.templates import save_chatty

pytestmark = pytest.mark.usefixtures("shared_statistics")

QUESTION = "Whose zorb is the {}?"
FACTS = [
    {
        "subject": "Eiffel Tower",
        "prompt": "The zorb of the {} is",
        "target": "Rome",
        "question": QUESTION,
    },
    {"subject": "France", "prompt": "The capital of {} is", "target": "Lyon"},
]
QUICK = ("--layers", "1-2", "--tokens", "400", "--set", "steps=8", "--set", "leverage=500")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_chatty(tmp_path_factory.mktemp("chatty"))


def made(folder: Path, model: Path, name: str, *options: str) -> Path:
    facts = folder / "facts.yaml"
    facts.write_text(json.dumps({"facts": FACTS}), encoding="utf-8")
    ran = run("make", facts, "--model", model, "-o", folder / name, *QUICK, *options)
    assert ran.code == 0, ran.err
    return folder / name


def test_questions_are_learned_kept_and_shown(model: Path, tmp_path: Path) -> None:
    learned = made(tmp_path, model, "chat.patch")
    silent = made(tmp_path, model, "silent.patch", "--set", "chat=0")
    given = made(tmp_path, model, "given.patch", "--wordings", "given")
    assert learned.read_bytes() != silent.read_bytes()
    assert "2 questions in chat form" in run("show", learned).out
    assert "1 question in chat form" in run("show", given).out
    assert "chat form" not in run("show", silent).out
    facts = run("show", learned, "--json").json["facts"]
    assert [fact["question"] for fact in facts] == [QUESTION, "What is the capital of {}?"]
    asked = ("ask", model, QUESTION.replace("{}", "Eiffel Tower"), "--chat", "--json", "--patch")
    first, second = (run(*asked, path).json["prompts"][0]["top"][0] for path in (learned, silent))
    assert first != second


def test_patches_with_questions_are_solved_again_as_they_were_made(model: Path, tmp_path: Path) -> None:
    path = made(tmp_path, model, "chat.patch")
    ran = run("stack", path, "--resolve", "--model", model, "-o", tmp_path / "again.patch")
    assert ran.code == 0, ran.err
    again = run("show", tmp_path / "again.patch", "--json").json
    assert again["hyperparameters"]["chat"] == 1
    assert [fact["question"] for fact in again["facts"]] == [QUESTION, "What is the capital of {}?"]
