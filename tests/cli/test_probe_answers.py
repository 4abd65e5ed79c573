"""probe --answers from the outside, on a tiny model with a chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kpatch.checkpoint.apply import apply
from tests.support.cli import run
from tests.support.saved import save_model, save_patch
from tests.support.templates import save_chatty

RECORDS = [
    {"question": "Where is Rome?", "answers": ["Italy"], "relation": "P17"},
    {"question": "Where is Paris?", "answers": ["France"], "relation": "P17"},
    {"question": "Who painted the Mona Lisa?", "answers": ["Leonardo", "Leonardo da Vinci"], "topic": "art"},
]


def save(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chatty(tmp_path_factory.mktemp("chatty"))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return save(tmp_path / "questions.jsonl", RECORDS)


def test_the_json_and_what_is_accepted(model: Path, questions: Path, tmp_path: Path) -> None:
    done = run("probe", questions, model, "--answers", "--per-fact", "--json")
    assert done.code == 0, done.err
    data = done.json
    assert (data["form"], data["patches"], data["unpatched"], data["left_out"]) == ("chat", [], None, 0)
    assert [(row["relation"], row["n"]) for row in data["relations"]] == [("P17", 2), ("art", 1)]
    assert (data["all"]["n"], data["all"]["exact"]) == (3, 0.0)
    assert [row["question"] for row in data["questions"]] == [one["question"] for one in RECORDS]
    # What the model says to the first question is accepted now
    said = [row["answer"] for row in data["questions"]]
    assert all(said)
    accepting = {**RECORDS[0], "answers": ["Italy", said[0]]}
    right = run("probe", model, save(tmp_path / "right.jsonl", [accepting, *RECORDS[1:]]), "--answers", "--json").json
    assert right["all"]["exact"] == pytest.approx(1 / 3)
    assert right["relations"][0]["exact"] == right["relations"][0]["recall"] == 0.5
    low, high = right["all"]["exact_interval"]
    assert low < 1 / 3 < high
    assert "questions" not in right


def test_forms(model: Path, questions: Path, tmp_path: Path) -> None:
    plain = run("probe", questions, model, "--answers", "--form", "completion", "--per-fact", "--json").json
    chat = run("probe", questions, model, "--answers", "--form", "chat", "--per-fact", "--json").json
    assert (plain["form"], chat["form"]) == ("completion", "chat")
    assert [row["answer"] for row in plain["questions"]] != [row["answer"] for row in chat["questions"]]
    without = save_model(tmp_path / "plain")
    assert run("probe", questions, without, "--answers", "--json").json["form"] == "completion"
    done = run("probe", questions, without, "--answers", "--form", "chat")
    assert done.code == 2
    assert "no chat template" in done.err


def test_a_patch_before_and_after(model: Path, questions: Path, tmp_path: Path) -> None:
    patch = save_patch(tmp_path / "news.patch", model)
    arguments = ("--answers", "--per-fact", "--json")
    alone = run("probe", questions, model, *arguments).json
    tried = run("probe", questions, model, "--patch", patch, *arguments).json
    assert tried["unpatched"] == {"all": alone["all"], "relations": alone["relations"]}
    assert [row["answer"] for row in tried["questions"]] != [row["answer"] for row in alone["questions"]]
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    apply([patch], folder)
    carried = run("probe", questions, folder, *arguments).json
    for key in ("patches", "all", "relations", "unpatched", "questions"):
        assert carried[key] == tried[key]


def test_what_people_read(model: Path, questions: Path, tmp_path: Path) -> None:
    patch = save_patch(tmp_path / "news.patch", model)
    done = run("probe", questions, model, "--answers", "--patch", patch, "--per-fact")
    for said in ("Exact", "Recall", "95 %", "P17", "art", "all", "→", "3 questions in the chat form", "Leonardo"):
        assert said in done.out, said
    limited = run("probe", questions, model, "--answers", "--limit", "1")
    assert "1 question in" in limited.out
    assert "→" not in limited.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--form", "chat"), "--form needs --answers"),
        (("--answers", "--form", "poem"), "--form 'poem' is not known"),
        (("--answers", "--objects", "all"), "--objects are for ranks"),
        (("--answers", "--patch", "nowhere.patch"), "nowhere.patch"),
    ],
)
def test_what_is_refused(arguments: tuple[str, ...], said: str, model: Path, questions: Path) -> None:
    done = run("probe", questions, model, *arguments)
    assert done.code == 2
    assert said in done.err


def test_a_file_with_mistakes(model: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "questions.jsonl", [RECORDS[0], {"question": "Where?", "answer": ["here"]}])
    done = run("probe", path, model, "--answers")
    assert done.code == 2
    assert f"{path}:2:1: unknown key 'answer'; did you mean 'answers'?" in done.err
