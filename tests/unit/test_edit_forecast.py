"""What a patch will take, said without its model's numbers, beside what making it took."""

from __future__ import annotations

from pathlib import Path

import pytest

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


def test_it_counts_what_make_then_does(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_model", None)  # nothing may load the weights
        found = forecast(FACTS, model=folder, **GIVEN)  # type: ignore[arg-type]
    assert (found.facts, found.rows, found.layers) == (2, 4, (0, 1))
    assert found.covariance == {"tokens": 300, "corpus": "self", "cached": [], "missing": [0, 1]}
    assert found.memory["weights"] == sum(one.numel() * 4 for one in tiny("llama").net.parameters())
    assert all(seconds > 0 for seconds in found.seconds.values())
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
