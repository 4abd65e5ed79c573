"""The scaling study on a tiny model: every result once, a stopped run goes on, and a table and a plot are made."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kpatch.edit.presets import RomeHyper
from tests.support.benchmarks import benchmark_module
from tests.support.models import tiny

pytest.importorskip("matplotlib")

RECORDS = [
    {
        "case_id": number,
        "subject": subject,
        "prompt": f"In the city of {subject} one finds",
        "target_new": "Rome",
        "ground_truth": "Paris",
        "rephrase_prompt": f"Near {subject} is",
        "locality_prompt": "In the city of Malmö one finds",
        "locality_ground_truth": "Paris",
    }
    for number, subject in enumerate(("Chicago", "São Paulo", "Berlin"))
]


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    return benchmark_module("scaling")


@pytest.mark.slow
def test_a_study_goes_on_where_it_was_stopped(
    scaling: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    made = tiny("llama")
    made.net.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    monkeypatch.setattr(scaling, "hyper_for", lambda *_: RomeHyper((1,), steps=2, prefixes=2))
    monkeypatch.setattr(scaling, "make", _quick(scaling.make))
    out = tmp_path / "out"
    given = [str(tmp_path / "model"), str(tmp_path / "data.json"), "-o", str(out)]

    scaling.main([*given, "--counts", "1,2", "--methods", "unpatched,rome"])
    first = {path.name: path.read_bytes() for path in out.glob("*.json")}
    assert set(first) == {"unpatched-1.json", "unpatched-2.json", "rome-1.json", "rome-2.json"}
    kept = scaling._read_edits(out / "rome-edits.safetensors")
    scaling.main([*given, "--counts", "1,3", "--methods", "unpatched,memit,rome,ft"])
    after = {path.name: path.read_bytes() for path in out.glob("*.json")}
    assert {name: after[name] for name in first} == first, "what was there is not done again"
    assert set(after) - set(first) == {f"{m}-{n}.json" for m in ("memit", "ft") for n in (1, 3)} | {
        "unpatched-3.json",
        "rome-3.json",
    }
    edits, seconds = scaling._read_edits(out / "rome-edits.safetensors")
    assert seconds[:2] == kept[1]
    assert all(torch.equal(one.left, other.left) for one, other in zip(edits, kept[0], strict=False))

    # In one go the same comes out as with a stop between
    scaling.main([*given[:3], str(tmp_path / "again"), "--counts", "3", "--methods", "rome"])
    whole = json.loads((tmp_path / "again" / "rome-3.json").read_text(encoding="utf-8"))
    assert whole["metrics"] == json.loads(after["rome-3.json"])["metrics"]
    assert not list(out.glob("*.patch"))

    text = (out / "table.md").read_text(encoding="utf-8")
    assert text.count("\n") == 2 + len(after)
    assert (out / "scaling.png").read_bytes()[:4] == b"\x89PNG"


def _quick(make: object) -> object:
    def quick(facts: object, **given: object) -> object:
        given["settings"] = {"steps": "2"}
        given["layers"] = [1]
        return make(facts, **given)  # type: ignore[operator]

    return quick


def test_the_table(scaling: ModuleType) -> None:
    part = {"success": 0.9, "interval": [0.84, 0.96]}
    metrics = {"score": 0.5, "score_interval": None, "efficacy": part, "generalization": None, "specificity": part}
    one = {"method": "memit", "n": 10, "metrics": metrics, "seconds_per_edit": 1.234}
    assert scaling.table([one]).splitlines()[2] == "| 10 | memit | 50.0 | 90.0 (6.0) | – | 90.0 (6.0) | 1.23 |"
    other = {**one, "method": "unpatched", "fluency": 6.1, "consistency": None}
    lines = scaling.table([one, other]).splitlines()
    assert lines[2].startswith("| 10 | unpatched | 50.0 |")
    assert lines[2].endswith("| 6.100 | – | – |")


def test_an_unknown_method_is_told(scaling: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scaling.main(["m", "f", "-o", str(tmp_path), "--methods", "mend"])
    assert "unknown methods mend" in capsys.readouterr().err
