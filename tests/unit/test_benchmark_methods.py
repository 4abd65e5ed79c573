"""The side-by-side benchmark on a tiny model: one judge for all, nothing done twice, a row for each method."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.support.benchmarks import benchmark_module
from tests.support.models import tiny

pytestmark = pytest.mark.usefixtures("shared_statistics")

ROOT = Path(__file__).parents[2]
FACTS = """
version: 1
relations:
  city: {prompt: "In the city of {} one finds", paraphrases: ["Near {} is"]}
facts:
  - {subject: Chicago, relation: city, target: Rome, was: Paris,
     neighbors: [{prompt: "In the city of Berlin one finds", target: Paris}]}
  - {subject: São Paulo, relation: city, target: Rome, was: Paris, space: true}
  - {subject: Malmö, relation: city, target: Paris, was: Rome}
"""


@pytest.fixture(scope="module")
def methods() -> ModuleType:
    return benchmark_module("methods")


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    torch.set_num_threads(1)
    monkeypatch.setenv("KPATCH_CACHE", str(tmp_path / "cache"))
    made = tiny("llama")
    made.net.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "facts.yaml").write_text(FACTS, encoding="utf-8")
    return [str(tmp_path / "model"), str(tmp_path / "facts.yaml"), "-n", "2", "-o", str(tmp_path / "out")]


def test_methods_side_by_side(methods: ModuleType, given: list[str], tmp_path: Path) -> None:
    chosen = (
        "--layers",
        "ft-paper=1",
        "--layers",
        "ft=1",
        "--set",
        "ft-paper.learning_rate=0.05",
        "--set",
        "ft.steps=1",
    )
    methods.main([*given, *chosen, "--methods", "unpatched,ft-paper"])
    out = tmp_path / "out"
    before, paper = (json.loads((out / f"{name}.json").read_text()) for name in ("unpatched", "ft-paper"))
    assert (before["n"], paper["n"], paper["layers"], before["seconds_per_fact"]) == (2, 2, [1], None)
    assert paper["metrics"]["ES"] == 1.0, "the judge sees the patch in memory"
    assert before["metrics"]["EA"] == 0.0
    assert set(paper["intervals"]) >= set(methods.COLUMNS)
    assert not list(out.glob("*.patch"))
    # What is there is not done again
    (out / "unpatched.json").write_text(json.dumps({**before, "model": "kept"}))
    methods.main([*given, *chosen, "--methods", "unpatched,ft"])
    assert json.loads((out / "unpatched.json").read_text())["model"] == "kept"
    rows = (out / "table.md").read_text(encoding="utf-8").splitlines()
    assert [row.split(" | ")[0] for row in rows] == ["| method", "| ---", "| unpatched", "| ft", "| ft-paper"]
    assert "(100 to 100)" in rows[-1]


def test_every_method_of_kpatch_can_be_compared(methods: ModuleType) -> None:
    from kpatch.edit.methods import _OWN

    assert set(methods.METHODS) >= {*_OWN} - {"mend"}, "mend needs a trained editor"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--methods", "memt"), "unknown methods memt"),
        (("-n", "4"), "holds 3 facts, and 4 were asked for"),
        (("--methods", "memit", "--layers", "memit=99"), "has no layer 99"),
    ],
)
def test_wrong_inputs(
    methods: ModuleType, given: list[str], more: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        methods.main([*given, *more])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
