"""HalluEditBench on a tiny model: what it gets wrong is taken, every method is measured once, a table is made."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kpatch.facts.fact import Fact, Neighbor
from tests.support.benchmarks import benchmark_module
from tests.support.saved import save_patch
from tests.support.templates import chatty, save_chatty
from tests.unit.test_facts_import import HALLU

pytestmark = pytest.mark.usefixtures("shared_statistics")

FACTS = [
    Fact("Basel", "Which river flows through {}?", "Elbe", neighbors=(Neighbor("Which river flows through Ulm?"),)),
    Fact("Rome", "Which river flows through {}?", "Tiber"),
]


@pytest.fixture(scope="module")
def hallu() -> ModuleType:
    torch.set_num_threads(1)
    return benchmark_module("hallu")


def test_records_that_are_answered_rightly_are_passed_over(hallu: ModuleType) -> None:
    model = chatty()
    assert hallu.wrong_ones(model, FACTS, 1) == FACTS[:1]
    answer = hallu.ask(model, FACTS[0].text(), chat=True, max_tokens=64)[0].completion
    words = [word for word in answer.split() if word.isalpha()]
    right = Fact("Basel", "Which river flows through {}?", words[0]) if words else FACTS[0]
    found = hallu.wrong_ones(model, [right, *FACTS], 5)
    assert found == ([*FACTS] if words else [right, *FACTS])


def test_neighbors_get_the_model_s_own_answers(hallu: ModuleType) -> None:
    model = chatty()
    first, second = hallu.with_own_answers(model, FACTS)
    own = hallu.ask(model, "Q: Which river flows through Ulm?\nA:", max_tokens=6)[0].completion
    lines = own.strip().splitlines()
    assert first.neighbors == (Neighbor("Which river flows through Ulm?", lines[0].strip() if lines else None),)
    assert second == FACTS[1]


def test_a_table_of_all_methods(hallu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_chatty(tmp_path / "model")
    path = tmp_path / "hallu.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(HALLU))
        writer.writeheader()
        writer.writerow(HALLU)
    calls: list[str] = []

    def quick(facts: Any, out: Path, method: str = "", preset: Path | None = None, **more: Any) -> None:
        calls.append(method or str(preset and preset.name))
        save_patch(out, model)

    monkeypatch.setattr(hallu, "make", quick)
    out = tmp_path / "out"
    hallu.main([str(model), str(path), "-o", str(out), "--methods", "memit,ft-paper"])
    assert calls == ["memit", "ft-paper.yaml"]
    lines = (out / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("| | chat (1) | question (1) | rephrased (1) | locality (")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| unedited", "| memit", "| ft-paper"]
    kept = json.loads((out / "unedited.json").read_text(encoding="utf-8"))
    assert kept["hops"] == [0.0, None, 1]
    hallu.main([str(model), str(path), "-o", str(out), "--methods", "memit,ft-paper"])
    assert calls == ["memit", "ft-paper.yaml"], "what is there is not done again"


def test_a_cell_has_its_interval(hallu: ModuleType) -> None:
    rows = {"unedited": {"chat": [0.25, [0.0, 0.5], 4], "hops": [None, None, 0]}}
    assert hallu.table(rows) == "| | chat (4) | hops (0) |\n| --- | --- | --- |\n| unedited | 25 (0 to 50) | – |\n"
