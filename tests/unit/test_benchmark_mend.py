"""The benchmark of editors on a tiny model: every result once, each from its own edit, and a table of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.benchmarks import benchmark_module
from tests.support.editors import save_editor
from tests.support.models import tiny
from tests.support.saved import save_model

pytestmark = pytest.mark.usefixtures("shared_statistics")

RECORDS = [
    {
        **{"case_id": number, "subject": subject, "prompt": f"In the city of {subject} one finds"},
        **{"target_new": "Rome", "ground_truth": "Paris", "rephrase_prompt": f"Near {subject} is"},
        **{"locality_prompt": "In the city of Malmö one finds", "locality_ground_truth": "Paris"},
    }
    for number, subject in enumerate(("Chicago", "São Paulo", "Berlin"))
]


@pytest.fixture
def benchmark() -> ModuleType:
    return benchmark_module("mend")


def test_every_result_is_made_once(benchmark: ModuleType, tmp_path: Path) -> None:
    model, facts, out = save_model(tmp_path / "model"), tmp_path / "facts.json", tmp_path / "out"
    facts.write_text(json.dumps(RECORDS), encoding="utf-8")
    editor = save_editor(tmp_path / "mend.safetensors", tiny("llama"), (1, 2, 3))
    arguments = [str(model), str(facts), str(editor), "-o", str(out), "--singles", "2", "--counts", "1,3,50"]
    benchmark.main([*arguments, "--hows", "unedited,sum"])
    first = {path.name: path.read_bytes() for path in out.glob("*.json")}
    assert set(first) == {"unedited-1.json", "sum-1.json", "unedited-3.json", "sum-3.json"}
    benchmark.main(arguments)
    assert {name: (out / name).read_bytes() for name in first} == first
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in out.glob("*.json")}
    assert set(found) == {f"{how}-{n}" for how in benchmark.HOWS for n in (1, 3)}
    assert [found[f"sum-{n}"]["metrics"]["efficacy"]["n"] for n in (1, 3)] == [2, 3]
    magnitudes = [found[f"{how}-3"]["metrics"]["efficacy"]["magnitude"] for how in benchmark.HOWS]
    assert len(set(magnitudes)) == 3
    lines = (out / "table.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 + 6
    assert [line.split("|")[2].strip() for line in lines[2:5]] == list(benchmark.HOWS.values())
