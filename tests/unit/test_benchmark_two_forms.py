"""Edited in one form, asked in the other, on a tiny model: every way of editing once, and a table."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.support.benchmarks import benchmark_module
from tests.support.saved import save_facts, save_patch
from tests.support.templates import save_chatty

pytestmark = pytest.mark.usefixtures("shared_statistics")

FACTS = [
    {"subject": "Basel", "prompt": "{} lies on the", "target": "Elbe", "question": "Which river has {}?"},
    {"subject": "Ann", "prompt": "{} reminds Bob of", "target": "Rome"},
]


@pytest.fixture(scope="module")
def two_forms() -> ModuleType:
    torch.set_num_threads(1)
    return benchmark_module("two_forms")


def test_every_way_of_editing_once(two_forms: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_chatty(tmp_path / "model")
    facts = save_facts(tmp_path / "facts.yaml", FACTS)
    calls: list[dict[str, str]] = []
    prompts: list[str] = []

    def quick(facts: Any, out: Path, settings: dict[str, str], **more: Any) -> None:
        assert [fact.subject for fact in facts] == ["Basel"], "a fact without a question is left out"
        calls.append(settings)
        prompts.append(facts[0].prompt)
        save_patch(out, model)

    monkeypatch.setattr(two_forms, "make", quick)
    given = [str(model), str(facts), "-o", str(tmp_path / "out"), "--set", "steps=2"]
    two_forms.main(given)
    assert calls == [{"steps": "2", "chat": chat} for chat in ("0", "2", "1", "1")]
    assert prompts == ["{} lies on the"] * 3 + ["Which river has {}?"], "the last has questions for prompts"
    lines = (tmp_path / "out" / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith(
        "| edited as | edits, completion (1) | edits, question (1) | edits, chat (1) | neighbors,"
    )
    ways = ["| unedited", "| statements", "| questions", "| both", "| asking"]
    assert [line.split(" | ")[0] for line in lines[2:]] == ways
    assert json.loads((tmp_path / "out" / "both.json").read_text(encoding="utf-8"))["chat"]["edits"]["n"] == 1
    two_forms.main(given)
    assert len(calls) == 4, "what is there is not done again"
