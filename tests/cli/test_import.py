"""import from the outside: what is written, what is told, how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kpatch.facts.load import load_facts
from tests.support.cli import run

RECORD = {
    "case_id": 1,
    "subject": "Basel",
    "prompt": "Basel lies on the",
    "target_new": "Elbe",
    "ground_truth": "Rhine",
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.json"
    contradicts = {**RECORD, "case_id": 2, "target_new": "Oder"}
    broken = [{**RECORD, "case_id": 10 + n, "subject": "Bern"} for n in range(30)]
    path.write_text(json.dumps([RECORD, contradicts, *broken]), encoding="utf-8")
    return path


def test_what_import_tells(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "facts.yaml"
    done = run("import", data, "-o", out)
    assert done.code == 0, done.err
    assert done.out == f"{out}: 2 facts from 32 records (easyedit)\n"
    assert "30 left out, for they break a rule" in done.err
    assert "and 10 more (-v lists them)" in done.err
    assert "1 kept, though they contradict an earlier fact" in done.err
    assert "record 2 (case_id 2)" in done.err
    assert len(load_facts(out, conflicts=True).facts) == 2
    everything = run("import", data, "-o", out, "--force", "-v").err
    assert "case_id 39" in everything
    assert "more (-v" not in everything


def test_the_json_of_import(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "facts.jsonl"
    found = run("import", data, "-o", out, "--json").json
    assert (found["format"], found["records"], found["facts"]) == ("easyedit", 32, 2)
    assert [len(found[key]) for key in ("rejected", "repeats", "conflicts")] == [30, 0, 1]
    assert run("import", data, "-o", out, "--force", "--drop-conflicts", "--json").json["facts"] == 1
    assert len(load_facts(out).facts) == 1


def test_a_fact_file_in_another_form(data: Path, tmp_path: Path) -> None:
    first, flat, again = tmp_path / "a.yaml", tmp_path / "b.json", tmp_path / "c.yaml"
    for source, target in ((data, first), (first, flat), (flat, again)):
        assert run("import", source, "-o", target, "-q").code == 0
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("nowhere.json", "-o", "x.yaml"), 2, "no such file"),
        (("data.json", "-o", "x.txt"), 2, "expected a name in .yaml"),
        (("data.json", "-o", "data.json"), 3, "exists"),
        (("data.json", "-o", "x.yaml", "--from", "magic"), 2, "'magic' is not known"),
        (("data.json", "-o", "x.yaml", "--target", "answers"), 2, "--target is for zsRE"),
        (("data.json",), 2, "--out"),
    ],
)
def test_what_import_refuses(
    data: Path, arguments: tuple[str, ...], code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    done = run("import", *arguments)
    assert done.code == code
    assert said in done.err
    assert not Path("x.yaml").exists()


def test_keys_that_are_left_out_are_reported(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{**RECORD, "portability_prompt": "The sea is", "empty": ""}]), encoding="utf-8")
    done = run("import", data, "-o", tmp_path / "facts.yaml")
    assert "keys left out, with the number of records that have them: portability_prompt (1)" in done.err
    assert run("import", data, "-o", tmp_path / "f.yaml", "--json").json["left_out"] == {"portability_prompt": 1}


def test_a_wrong_format_is_named_as_the_option(data: Path, tmp_path: Path) -> None:
    done = run("import", data, "-o", tmp_path / "facts.yaml", "--from", "magic")
    assert done.code == 2
    assert "--from 'magic' is not known" in done.err
