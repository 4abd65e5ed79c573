"""ask from the outside: prompts to continue, and questions in the chat form, on a tiny model with a chat template."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kpatch.checkpoint.apply import apply
from kpatch.evaluate import answers
from kpatch.evaluate.answers import Answer
from tests.support import templates
from tests.support.cli import run
from tests.support.saved import save_patch
from tests.support.templates import chatty, save_chatty

QUESTIONS = ["In which city is the Eiffel Tower?", " Where is Rome?\n"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_chatty(tmp_path_factory.mktemp("chatty"))


@pytest.fixture
def patch(tmp_path: Path, model: Path) -> Path:
    return save_patch(tmp_path / "news.patch", model)


def generated(question: str, length: int) -> str:
    """transformers' own greedy answer to a user's turn."""
    loaded = chatty()
    turns = [{"role": "user", "content": question.strip()}]
    ids = loaded.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    ends = [0, *loaded.tokenizer.convert_tokens_to_ids(["<|im_end|>"])]
    found = loaded.net.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, eos_token_id=ends
    )
    return str(loaded.tokenizer.decode([token for token in found[0, ids.shape[1] :].tolist() if token not in ends]))


def test_a_question_is_put_in_the_chat_template(model: Path) -> None:
    done = run("ask", model, *QUESTIONS, "--chat", "--max-tokens", "10", "--top", "2", "--json")
    assert done.code == 0, done.err
    assert done.json["chat"] is True
    assert [row["prompt"] for row in done.json["prompts"]] == QUESTIONS
    assert [row["completion"] for row in done.json["prompts"]] == [generated(text, 10) for text in QUESTIONS]
    assert [len(row["top"]) for row in done.json["prompts"]] == [2, 2]
    plain = run("ask", model, *QUESTIONS, "--max-tokens", "10", "--json").json
    assert plain["chat"] is False
    assert [row["completion"] for row in plain["prompts"]] != [row["completion"] for row in done.json["prompts"]]


def test_how_long_answers_are_by_themselves(model: Path) -> None:
    chat, plain = (run("ask", model, QUESTIONS[0], *more, "--json").json for more in (["--chat"], []))
    assert chat["prompts"][0]["completion"] == generated(QUESTIONS[0], 64)
    assert len(chat["prompts"][0]["completion"]) > len(plain["prompts"][0]["completion"])


def test_before_and_after_a_patch_in_chat(model: Path, patch: Path, tmp_path: Path) -> None:
    done = run("ask", model, *QUESTIONS, "--chat", "--patch", patch, "--max-tokens", "6", "--json").json
    apply([patch], model, out=tmp_path / "patched")
    alone = run("ask", tmp_path / "patched", *QUESTIONS, "--chat", "--max-tokens", "6", "--json").json
    assert [row["completion"] for row in done["prompts"]] == [row["completion"] for row in alone["prompts"]]
    assert [row["completion"] for row in done["unpatched"]] == [generated(text, 6) for text in QUESTIONS]
    shown = run("ask", model, QUESTIONS[0], "--chat", "--patch", patch, "--max-tokens", "2")
    assert "Before" in shown.out
    assert QUESTIONS[0] in shown.out


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template"),
        (templates.DROPS, "drops or rewrites"),
        (templates.ALWAYS_THINKING, "opens a thought"),
    ],
)
def test_what_ask_in_chat_refuses(template: str | None, said: str, tmp_path: Path) -> None:
    done = run("ask", save_chatty(tmp_path / "model", template), QUESTIONS[0], "--chat")
    assert done.code == 2
    assert said in done.err
    assert "hint:" in done.err


def test_an_answer_that_is_empty_is_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "ask", lambda *_: [Answer(QUESTIONS[0], " ", ()), Answer(QUESTIONS[1], "Rome", ())])
    done = run("ask", model, *QUESTIONS[:2], "--chat")
    assert done.code == 0
    assert "1 empty answer: the model writes nothing before it stops" in done.err
    assert "empty" not in run("ask", model, *QUESTIONS[:2], "--max-tokens", "0").err
