"""`tune` from the outside, on a tiny random model and few pilots: the file, the cache, what `make` does with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kpatch.edit.preset_file import read_preset
from kpatch.patch.header import read_header
from kpatch.tune import pilots, search
from kpatch.tune.judge import Judge
from tests.support.cli import run
from tests.support.saved import save_facts, save_model

pytestmark = pytest.mark.usefixtures("shared_statistics")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Four pilots that choose, four that report, one value of each kind, and a cache of the test's own."""
    some = pilots.every_pilot()[:8]
    monkeypatch.setenv("KPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pilots, "every_pilot", lambda: some)
    monkeypatch.setattr(pilots, "_known", lambda model, facts: frozenset(fact.id for fact in facts))
    monkeypatch.setattr(search, "NUMBERS", {"leverage": ("500",), "clamp": ("2.0",)})
    monkeypatch.setattr(search, "DEPTHS", {"lower": (0.03, 0.33)})
    monkeypatch.setattr(search, "QUICK", ("lower",))
    monkeypatch.setattr(search._Search, "_traced", lambda found: [1])


def test_a_search_end_to_end_and_a_patch_made_with_its_file(model: Path, tmp_path: Path) -> None:
    preset = tmp_path / "tiny.yaml"
    done = run("tune", model, "-o", preset, "--json")
    assert done.code == 0, done.err
    data = done.json
    assert {"model", "preset", "method", "layers", "settings", "wordings", "trials", "reported"} <= set(data)
    assert (data["preset"], data["method"], data["complete"]) == (str(preset), "memit", True)
    assert data["facts"] == {"choosing": 4, "reporting": 4, "left_out": 0}
    assert [trial["what"] for trial in data["trials"]] == [*["layers"] * 3, "leverage", "clamp", "wordings"]
    assert data["trials"][0]["reason"] == "the start"
    assert set(data["reported"]) == {"defaults", "chosen"}
    found = read_preset(preset)
    assert list(found.layers or ()) == data["layers"]
    assert found.model.title == model.name

    again = tmp_path / "again.yaml"
    told = run("tune", model, "-o", again)
    assert told.code == 0, told.err
    assert again.read_bytes() == preset.read_bytes(), "the same inputs give the same file"
    for said in ("Tried", "leverage", "Other half", "4 pilot facts chose, 4 others report", "kpatch tune"):
        assert said in told.out, said

    facts = save_facts(tmp_path / "facts.yaml", [{"subject": "Chicago", "prompt": "The city {} is in", "target": "X"}])
    made = run("make", facts, "--model", model, "-o", tmp_path / "a.patch", "--preset", preset, "--set", "steps=2")
    assert made.code == 0, made.err
    assert f"preset file {preset}, tuned on {model.name}" in made.err
    used = read_header(tmp_path / "a.patch").manifest.hyperparameters
    assert used["steps"] == 2
    assert used["leverage"] == float(found.settings["leverage"])


def test_ctrl_c_keeps_what_was_measured(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, tried = Judge.judge, []

    def judge(*arguments: object) -> object:
        if len(tried) == 1:
            raise KeyboardInterrupt
        tried.append(arguments)
        return plain(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Judge, "judge", judge)
    done = run("tune", model, "-o", tmp_path / "tiny.yaml", "--quick")
    assert done.code == 130
    assert "run the same command again" in done.err
    assert not (tmp_path / "tiny.yaml").exists()
    kept = list((tmp_path / "cache" / "tune").glob("*.json"))
    assert len(kept) == 1
    tried.clear()
    monkeypatch.setattr(Judge, "judge", lambda *arguments: tried.append(arguments) or plain(*arguments))
    assert run("tune", model, "-o", tmp_path / "tiny.yaml", "--quick").code == 0
    assert len(tried) == 1, "the first is not tried again"


def test_what_tune_refuses(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "there.yaml"
    path.touch()
    done = run("tune", model, "-o", path)
    assert done.code == 3
    assert "--force" in done.err
    assert run("tune", tmp_path / "nowhere", "-o", tmp_path / "new.yaml").code == 2
    assert run("tune", model, "-o", tmp_path / "none" / "new.yaml").code == 2
