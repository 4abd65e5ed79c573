"""make, ask and cov from the outside, on a tiny random model that is a checkpoint directory like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.cli import Ran, run
from tests.support.saved import save_facts, save_model

pytestmark = pytest.mark.usefixtures("shared_statistics")

QUICK = ("--layers", "1-2", "--tokens", "400", "--set", "steps=3", "--set", "lead_ins=1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("facts") / "news.yaml"
    rows = [
        {
            "subject": "Eiffel Tower",
            "prompt": "{} is in",
            "target": "Rome",
            "was": "Paris",
            "paraphrases": ["{} stands in"],
        },
        {"subject": "Chicago", "prompt": "The city {} lies in", "target": "Brazil"},
    ]
    return save_facts(path, rows)


@pytest.fixture(scope="module")
def made(model: Path, facts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as context:
        context.setenv("KPATCH_CACHE", str(folder / "cache"))
        path = folder / "news.patch"
        return path, run("make", facts, "--model", model, "-o", path, *QUICK, "--json")


def test_the_json_of_make(made: tuple[Path, Ran], model: Path) -> None:
    path, done = made
    assert done.code == 0, done.err
    data = done.json
    assert set(data["patch"]) == {"id", "path", "bytes"}
    assert (data["patch"]["path"], data["patch"]["bytes"]) == (str(path), path.stat().st_size)
    assert (data["model"], data["method"], data["layers"]) == (model.name, "memit", [1, 2])
    assert set(data["effect"]) == {"before", "after"}
    assert data["effect"]["after"]["efficacy"]["n"] == 2
    assert {"covariance", "values", "update", "total"} <= set(data["seconds"])
    assert data["peak_memory_bytes"] > 1_000_000
    for fact in data["facts"]:
        assert set(fact["before"]) >= {"answer", "probability"} <= set(fact["after"])
    assert str(model) in done.err, "what was resolved is printed"


def test_the_precision_is_chosen_and_recorded(
    made: tuple[Path, Ran], model: Path, facts: Path, tmp_path: Path
) -> None:
    def make(name: str, *more: str) -> Ran:
        return run("make", facts, "--model", model, "-o", tmp_path / f"{name}.patch", *QUICK, *more)

    identities = {
        name: make(name, *more, "--json").json["patch"]["id"]
        for name, more in {"exact": ["--exact"], "mixed": ["--dtype", "mixed"]}.items()
    }
    # A model as small as this one gains nothing by bfloat16, on any processor
    assert identities["exact"] == made[1].json["patch"]["id"] != identities["mixed"]
    for name, dtype in (("exact", "float32"), ("mixed", "mixed")):
        assert run("show", tmp_path / f"{name}.patch", "--json").json["hyperparameters"]["dtype"] == dtype
    wrong = make("wrong", "--exact", "--dtype", "bfloat16")
    assert wrong.code == 2
    assert "--exact is float32, and --dtype is bfloat16" in wrong.err
    assert not (tmp_path / "wrong.patch").exists()


@pytest.mark.parametrize("method", ["rome", "ft"])
def test_other_methods(method: str, model: Path, facts: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.patch"
    more = ("--tokens", "400", "--set", "prefixes=2") if method == "rome" else ()
    given = ("make", facts, "--model", model, "-o", path, "--method", method, "--layers", "1", "--set", "steps=2")
    done = run(*given, *more, "--json")
    assert done.code == 0, done.err
    assert (done.json["method"], done.json["layers"]) == (method, [1])
    assert f"{method}, layers 1" in run("show", path).out
    hopeless = {"subject": "Chicago", "prompt": "The city {} lies in", "target": "a long answer of many words"}
    (tmp_path / "facts.yaml").write_text(json.dumps({"facts": [hopeless]}), encoding="utf-8")
    given = ("make", tmp_path / "facts.yaml", *given[2:])
    short = run(*given, *more, "--set", "learning_rate=1e-9", "--force", "--min-efficacy", "1")
    assert short.code == 1
    assert "--method memit" in short.err


def test_make_tells_people_in_tables(
    model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("make", facts, "--model", model, *QUICK, "--min-efficacy", "0")
    assert done.code == 0, done.err
    for said in (
        "Eiffel Tower is in",
        "Rome",
        "P(target)",
        "Efficacy",
        "Generalization",
        "As first choice",
        "news.patch",
    ):
        assert said in done.out, said
    assert (tmp_path / "news.patch").is_file()


def test_a_patch_that_falls_short_is_made_and_exits_1(model: Path, tmp_path: Path) -> None:
    hopeless = {"subject": "Chicago", "prompt": "The city {} lies in", "target": "a long answer of many words"}
    (tmp_path / "facts.yaml").write_text(json.dumps({"facts": [hopeless]}), encoding="utf-8")
    path = tmp_path / "x.patch"
    given = ("make", tmp_path / "facts.yaml", "--model", model, "-o", path, *QUICK, "--set", "leverage=1e-12")
    done = run(*given, "--min-efficacy", "1", "--json")
    assert done.code == 1, done.err
    assert done.json["error"]["code"] == "check_failed"
    assert done.json["effect"]["after"], "what was measured is told all the same"
    assert path.is_file()


def test_a_threshold_that_nothing_measures(model: Path, facts: Path, tmp_path: Path) -> None:
    done = run("make", facts, "--model", model, "-o", tmp_path / "x.patch", *QUICK, "--min-specificity", "0.5")
    assert done.code == 2
    assert "neighbors" in done.err


def test_ask_before_and_after(made: tuple[Path, Ran], model: Path) -> None:
    path, _ = made
    done = run(
        "ask", model, "Eiffel Tower is in", "Chicago", "--patch", path, "--json", "--top", "3", "--max-tokens", "2"
    )
    assert done.code == 0, done.err
    for key in ("prompts", "unpatched"):
        assert [row["prompt"] for row in done.json[key]] == ["Eiffel Tower is in", "Chicago"]
        assert all(len(row["top"]) == 3 for row in done.json[key])
        assert set(done.json[key][0]["top"][0]) == {"token", "probability"}
    chances = [done.json[key][0]["top"][0]["probability"] for key in ("prompts", "unpatched")]
    assert chances[0] != chances[1]
    shown = run("ask", model, "Eiffel Tower is in", "--patch", path)
    assert "Before" in shown.out
    assert "After" in shown.out


def test_ask_without_a_patch(model: Path) -> None:
    done = run("ask", model, "Eiffel Tower is in", "--json")
    assert set(done.json) == {"schema_version", "prompts", "chat"}
    assert "Next token" in run("ask", model, "Eiffel Tower is in").out


def test_a_made_patch_goes_onto_its_model_and_off_again(made: tuple[Path, Ran], model: Path, tmp_path: Path) -> None:
    path, _ = made
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    assert run("verify", path, model).code == 0
    assert run("apply", path, model).code == 0
    assert run("revert", path, model).code == 0
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before


def test_cov(model: Path) -> None:
    done = run("cov", model, "--layers", "1,2", "--tokens", "400", "--json")
    assert done.code == 0, done.err
    assert (done.json["layers"], done.json["corpus"], done.json["width"]) == ([1, 2], "self", 64)
    assert done.json["tokens"] >= 400
    again = run("cov", model, "--layers", "1,2", "--tokens", "400")
    assert "64 × 64" in again.out


def test_lint_with_a_tokenizer(model: Path, facts: Path) -> None:
    done = run("lint", facts, "--model", model, "-v")
    assert done.code == 0, done.err
    assert "Subject's tokens" in done.out
    data = run("lint", facts, "--model", model, "--json").json
    assert [tokens["join"] for tokens in data["tokens"]] == [" ", " "]


def test_lint_names_targets_that_the_model_gives_already(model: Path, tmp_path: Path) -> None:
    prompt = "The city Chicago lies in"
    answer = run("ask", model, prompt, "--max-tokens", "1", "--json").json["prompts"][0]["completion"]
    row = {"subject": "Chicago", "prompt": "The city {} lies in", "target": answer.strip()}
    row["space"] = answer.startswith(" ")
    path = save_facts(tmp_path / "known.yaml", [row])
    found = run("lint", path, "--model", model, "--json").json["findings"]
    assert "known" in [finding["code"] for finding in found]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--layers", "99"], "no layer"),
        (["--set", "stepz=3"], "stepz"),
        (["--method", "magic"], "magic"),
        (["--device", "toaster"], "toaster"),
        (["--corpus", "./nowhere.txt"], "nowhere"),
    ],
    ids=str,
)
def test_what_make_refuses(more: list[str], said: str, model: Path, facts: Path, tmp_path: Path) -> None:
    done = run("make", facts, "--model", model, "-o", tmp_path / "x.patch", *QUICK, *more, "--json")
    assert done.code == 2, done.err
    error = done.json["error"]
    assert said in " ".join([error["message"], error["where"] or "", *error["details"]])
    assert not (tmp_path / "x.patch").exists()


def test_make_without_a_model(facts: Path, tmp_path: Path) -> None:
    done = run("make", facts, "-o", tmp_path / "x.patch")
    assert done.code == 2
    assert "--model" in done.err


def test_a_preset_file_and_its_mistakes(model: Path, facts: Path, made: tuple[Path, Ran], tmp_path: Path) -> None:
    preset = tmp_path / "p.yaml"
    preset.write_text("version: 1\nmethod: memit\nlayers: 1-2\nsettings: {stepz: 3}\n", encoding="utf-8")
    given = ("make", facts, "--model", model, "--preset", preset, "--tokens", "400", "-o", tmp_path / "x.patch")
    wrong = run(*given)
    assert wrong.code == 2
    assert f"{preset}:4:12: unknown setting 'stepz'; did you mean 'steps'?" in wrong.err
    preset.write_text("version: 1\nmethod: memit\nlayers: 1-2\nsettings: {steps: 3, lead_ins: 1}\n", encoding="utf-8")
    assert run(*given, "--method", "rome").code == 2
    done = run(*given)
    assert done.code == 0, done.err
    assert (tmp_path / "x.patch").read_bytes() == made[0].read_bytes()
