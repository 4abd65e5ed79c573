"""What a patch will take, said without its model's numbers, beside what making it took."""

from __future__ import annotations

from pathlib import Path

import pytest

from kpatch.checkpoint.apply import apply
from kpatch.edit.forecast import forecast
from kpatch.edit.make import make
from kpatch.errors import BadInput
from kpatch.facts.fact import Fact
from kpatch.models import model as loading
from tests.support.models import tiny

FACTS = [Fact(subject="Basel", prompt="In {} is", target="Rome"), Fact(subject="Ann", prompt="So {} is", target="Bob")]
SETTINGS = {"steps": "2", "subject_weight": "0", "lead_ins": "1", "chat": "0"}
GIVEN = {"layers": [0, 1], "tokens": 300, "settings": SETTINGS, "wordings": "none"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny("llama")
    model.net.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_many_facts_are_refined(folder: Path) -> None:
    many = {**GIVEN, "settings": {**SETTINGS, "refine_from": str(len(FACTS))}}
    found = forecast(FACTS, model=folder, **many)  # type: ignore[arg-type]
    assert 0 < found.seconds["refining"] < found.seconds["total"]
    plain = {**GIVEN, "settings": {**many["settings"], "refine": "0"}}  # type: ignore[dict-item]
    assert forecast(FACTS, model=folder, **plain).seconds["refining"] == 0  # type: ignore[arg-type]


def test_it_counts_what_make_then_does(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_model", None)  # nothing may load the weights
        found = forecast(FACTS, model=folder, **GIVEN)  # type: ignore[arg-type]
    assert (found.facts, found.rows, found.layers) == (2, 4, (0, 1))
    assert found.covariance == {"tokens": 300, "corpus": "self", "cached": [], "missing": [0, 1]}
    assert found.memory["weights"] == sum(one.numel() * 4 for one in tiny("llama").net.parameters())
    assert found.seconds["refining"] == 0, "two facts are few"
    assert all(seconds > 0 for step, seconds in found.seconds.items() if step != "refining")
    assert found.memory["total"] == sum(size for part, size in found.memory.items() if part != "total")
    made = make(FACTS, model=str(folder), out=tmp_path / "one.patch", **GIVEN)  # type: ignore[arg-type]
    assert abs(found.disk["patch"] - made.bytes) < 10_000, "the manifest is not counted"
    again = forecast(FACTS, model=folder, **GIVEN)  # type: ignore[arg-type]
    assert again.covariance["cached"] == [0, 1]
    assert again.seconds["sampling"] == again.seconds["covariance"] == 0
    assert again.disk["cache"] == 0


def test_more_steps_take_longer(folder: Path) -> None:
    slow = forecast(FACTS, model=folder, **{**GIVEN, "settings": {**SETTINGS, "steps": "2000"}})  # type: ignore[arg-type]
    quick = forecast(FACTS, model=folder, **GIVEN)  # type: ignore[arg-type]
    assert slow.seconds["values"] > 10 * quick.seconds["values"]


@pytest.mark.parametrize("method", ["rome", "memit-paper"])
def test_a_method_that_needs_the_model_is_named(folder: Path, method: str) -> None:
    with pytest.raises(BadInput, match=method):
        forecast(FACTS, model=folder, method=method, layers=[1])


def test_a_chain_counts_the_facts_it_holds_and_finds_the_base_covariance(folder: Path, tmp_path: Path) -> None:
    make(FACTS, model=str(folder), out=tmp_path / "one.patch", **GIVEN)  # type: ignore[arg-type]
    apply(tmp_path / "one.patch", folder)
    again = Fact(subject="Basel", prompt="Near {} lies", target="Bern")  # learns the first fact of the two again
    alone = forecast([again], model=folder, **GIVEN)  # type: ignore[arg-type]
    found = forecast([again], on=folder, **GIVEN)  # type: ignore[arg-type]
    assert (found.facts, found.earlier, alone.earlier) == (1, 2, 0)
    assert found.rows == alone.rows + 2
    assert found.covariance["missing"] == [], "C is the base's, which the first patch collected"
    assert alone.covariance["missing"] == [0, 1], "the patched weights are other weights"
    assert found.memory["edited_weights"] == 2 * alone.memory["edited_weights"]


def test_weights_that_stay_on_the_disk_take_no_memory(folder: Path) -> None:
    pytest.importorskip("accelerate")
    whole = forecast(FACTS, model=folder, **GIVEN)  # type: ignore[arg-type]
    found = forecast(FACTS, model=folder, max_memory=whole.memory["weights"] // 2, **GIVEN)  # type: ignore[arg-type]
    assert 0 < found.memory["weights"] <= whole.memory["weights"] // 2
    assert found.memory["weights"] + found.disk["weights"] == whole.memory["weights"]
    assert "weights" not in whole.disk


def test_two_models_are_refused(folder: Path) -> None:
    with pytest.raises(BadInput, match="exclude each other"):
        forecast(FACTS, model=folder, on=folder, **GIVEN)  # type: ignore[arg-type]
