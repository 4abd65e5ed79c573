"""probe from the outside, on a tiny random model that is a checkpoint directory like any other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kpatch.checkpoint.apply import apply
from kpatch.cli.targets import facts_and_model
from tests.support.cli import run
from tests.support.saved import save_facts, save_model, save_patch

FACTS = [
    {"subject": "Eiffel Tower", "prompt": "The {} is in", "target": "Paris", "relation": "P17"},
    {"subject": "Chicago", "prompt": "The city {} lies in", "target": "the United States", "relation": "P17"},
    {"subject": "Mona Lisa", "prompt": "The painter of the {} was", "target": "Leonardo", "relation": "P170"},
    {"subject": "Brazil", "prompt": "People in {} speak", "target": "Portuguese"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    return save_facts(tmp_path / "facts.yaml", FACTS)


@pytest.fixture
def patch(tmp_path: Path, model: Path) -> Path:
    return save_patch(tmp_path / "news.patch", model)


def test_the_json_of_probe(model: Path, facts: Path) -> None:
    done = run("probe", facts, model, "--per-fact", "--json")
    assert done.code == 0, done.err
    data = done.json
    assert (data["model"], data["patches"], data["objects"], data["unpatched"]) == (model.name, [], 4, None)
    assert [(row["relation"], row["n"]) for row in data["relations"]] == [("P17", 2), ("P170", 1), ("(none)", 1)]
    assert data["all"]["n"] == 4
    assert data["all"]["p_at_10"] == 1.0
    assert [row["target"] for row in data["facts"]] == [fact["target"] for fact in FACTS]
    ranks = [row["rank"] for row in data["facts"]]
    assert data["all"]["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / 4)
    assert all(1 <= rank <= 4 for rank in ranks)
    assert "facts" not in run("probe", facts, model, "--json").json


def test_a_patch_before_and_after(model: Path, facts: Path, patch: Path, tmp_path: Path) -> None:
    tried = run("probe", facts, model, "--patch", patch, "--json", "--per-fact").json
    alone = run("probe", facts, model, "--json").json
    assert tried["unpatched"] == {key: alone[key] for key in ("all", "relations", "lama")}
    assert tried["all"] != alone["all"]
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    apply([patch], folder)
    carried = run("probe", facts, folder, "--json", "--per-fact").json
    for key in ("patches", "all", "relations", "unpatched", "facts"):
        assert carried[key] == tried[key]


def test_probe_tells_people_in_a_table(model: Path, facts: Path, patch: Path) -> None:
    done = run("probe", facts, model, "--patch", patch, "--per-fact")
    for said in ("P@1", "P@100", "MRR", "P170", "all", "→", "Leonardo", "among 4 objects"):
        assert said in done.out, said
    assert "→" not in run("probe", facts, model).out


def test_objects(model: Path, facts: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("Rome\n\n Italy \nParis\n", encoding="utf-8")
    assert run("probe", facts, model, "--objects", names, "--json").json["objects"] == 6
    by_relation = run("probe", facts, model, "--objects", "relation", "--per-fact", "--json").json
    assert [row["rank"] for row in by_relation["facts"][2:]] == [1, 1], "the only one of its relation"
    limited = run("probe", facts, model, "--limit", "1", "--json").json
    assert (limited["all"]["n"], limited["objects"]) == (1, 4)


def test_ranks_among_the_vocabulary(model: Path, tmp_path: Path) -> None:
    words = [{"subject": "Ann", "prompt": "{} is", "target": word, "relation": "is"} for word in ("a", "Louvresque")]
    facts = save_facts(tmp_path / "words.yaml", words)
    done = run("probe", facts, model, "--objects", "vocabulary", "--per-fact", "--json")
    assert done.code == 0, done.err
    assert [row["target"] for row in done.json["facts"]] == ["a"]
    assert done.json["objects"] > 100
    assert done.json["lama"]["totals"][-1]["facts"] == 1
    assert "1 fact with a target of several tokens left out" in done.err
    refused = run("probe", save_facts(tmp_path / "long.yaml", words[1:]), model, "--objects", "vocabulary")
    assert refused.code == 2
    assert "No target is one token" in refused.err


def test_the_table_of_lama(model: Path, facts: Path, patch: Path, tmp_path: Path) -> None:
    data = run("probe", facts, model, "--json").json
    rows = [(row["relation"], row["kind"], row["facts"], row["frequency"]) for row in data["lama"]["relations"]]
    assert rows == [("P17", "1-1", 2, 0.5), ("P170", "1-1", 1, 1.0)]
    kinds = {row["kind"]: (row["relations"], row["facts"], row["frequency"]) for row in data["lama"]["totals"]}
    assert kinds == {"1-1": (2, 3, 0.75), "N-1": (0, 0, None), "N-M": (0, 0, None), "total": (2, 3, 0.75)}
    among = run("probe", facts, model, "--objects", "relation", "--json").json
    assert among["lama"]["relations"][1]["p_at_1"] == 1.0, "the only one of its relation"
    done = run("probe", facts, model, "--patch", patch)
    assert "1-1" in done.out
    assert "N-M" not in done.out, "there is none"
    unnamed = save_facts(tmp_path / "unnamed.yaml", FACTS[3:])
    assert run("probe", unnamed, model, "--json").json["lama"] is None
    assert "LAMA" not in run("probe", unnamed, model).out


@pytest.mark.parametrize("command", ["probe", "eval"])
def test_facts_and_model_in_either_order(command: str, model: Path, facts: Path) -> None:
    usual = run(command, facts, model, "--json").json
    other = run(command, model, facts, "--json").json
    assert {**other, "seconds": 0} == {**usual, "seconds": 0}


def test_which_argument_is_the_fact_file(facts: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(facts.parent)
    for suffix in ("yml", "jsonl", "csv", "YAML"):
        (facts.parent / f"f.{suffix}").touch()
        assert facts_and_model("./model", f"f.{suffix}") == (Path(f"f.{suffix}"), "./model")
    assert facts_and_model("facts.yaml", "./model") == (Path("facts.yaml"), "./model")
    assert facts_and_model("gone.yaml", "org/model") == (Path("gone.yaml"), "org/model")
    assert facts_and_model("org/model", "gone.yaml") == (Path("org/model"), "gone.yaml")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--objects", "nowhere.txt"), "no such file"),
        (("--patch", "nowhere.patch"), "nowhere.patch"),
        (("--limit", "0"), "--limit"),
    ],
)
def test_what_probe_refuses(arguments: tuple[str, ...], said: str, model: Path, facts: Path) -> None:
    done = run("probe", facts, model, *arguments)
    assert done.code == 2
    assert said in done.err
