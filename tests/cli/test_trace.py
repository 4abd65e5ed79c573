"""`kpatch trace` and `make --layers-from` from the outside, on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kpatch.cli.heatmap import print_heatmap
from kpatch.cli.output import Output
from kpatch.trace.panels import Panel
from tests.support.cli import Ran, run
from tests.support.models import LAYERS
from tests.support.tracing import known_facts, model_of

pytestmark = pytest.mark.usefixtures("shared_statistics")

QUICK = ("--samples", "3", "--window", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    model_of().net.save_pretrained(folder)
    model_of().tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("facts") / "known.json"
    rows = [{"subject": f.subject, "attribute": f.target, "prompt": f.text()} for f in known_facts(most=20)]
    rows.append({"subject": "Chicago", "attribute": "xylophone", "prompt": "The city of Chicago stands in"})
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def traced(model: Path, facts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    folder = tmp_path_factory.mktemp("traced")
    with pytest.MonkeyPatch.context() as context:
        context.setenv("KPATCH_CACHE", str(folder / "cache"))
        page = folder / "report.html"
        given = ("--facts", facts, *QUICK, "-o", folder / "out", "--html", page, "--json")
        return folder, run("trace", model, *given)


def test_the_json_of_trace(traced: tuple[Path, Ran], model: Path) -> None:
    folder, done = traced
    assert done.code == 0, done.err
    data = done.json
    assert data["model"] == model.name
    assert data["facts"] == {"tried": len(known_facts(most=20)) + 1, "kept": len(known_facts(most=20))}
    assert (data["noise"], data["samples"], data["window"]) == (3.0, 3, 2)
    assert len(data["severed"]["plain"]) == LAYERS
    assert data["total_effect"] == pytest.approx(data["clean"]["mean"] - data["corrupted"]["mean"])
    assert data["seconds"] > 0
    names = ["trace.json", "effects.png", "effects.svg", "severed.png", "severed.svg"]
    assert data["files"] == [*(str(folder / "out" / name) for name in names), str(folder / "report.html")]
    assert all(Path(path).stat().st_size > 500 for path in data["files"])
    assert f"predicts {len(known_facts(most=20))} of {len(known_facts(most=20)) + 1} facts tried" in done.err


def test_trace_tells_people_in_pictures(model: Path, facts: Path) -> None:
    done = run("trace", model, "--facts", facts, *QUICK, "--limit", "2")
    assert done.code == 0, done.err
    for said in (
        "Restoring a state: average indirect effect",
        "Restoring 2 MLP outputs",
        "last subject token",
        "attention severed",
        "Largest effect (95 %)",
        "Attention window",
        "2 facts that",
        "total effect",
        "R = ",
    ):
        assert said in done.out, said
    assert "\x1b" not in done.out, "no colours where there is no terminal"
    assert not run("trace", model, "--facts", facts, *QUICK, "--limit", "2", "-q").err


def test_quick_asks_for_the_curves_alone(model: Path, facts: Path) -> None:
    done = run("trace", model, "--facts", facts, "--quick", "--samples", "2", "--json")
    assert done.code == 0, done.err
    assert done.json["quick"] is True
    assert done.json["effects"] == {"states": None, "mlp": None, "attn": None}


def test_one_prompt(model: Path) -> None:
    done = run("trace", model, "--prompt", "The {} is in", "--subject", "Eiffel Tower", *QUICK)
    assert done.code == 0, done.err
    assert "The Eiffel Tower is in →" in done.out
    assert "from one fact only" in done.out or "No layers" in done.out
    in_words = ("--prompt", "The Eiffel Tower is in", "--subject", "Eiffel Tower")
    assert run("trace", model, *in_words, *QUICK).out == done.out


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--prompt", "The {} is in"], 2, "--subject is missing"),
        (["--subject", "Rome"], 2, "--prompt is missing"),
        (["--prompt", "Paris is in", "--subject", "Rome"], 2, "'Rome' is not in the prompt"),
        (["--noise", "0", "--quick"], 2, "--noise 0 corrupts nothing"),
        (["--window", "5"], 2, "--window 5 does not fit"),
        (["--samples", "0"], 2, "--samples"),
        (["--limit", "0"], 2, "--limit"),
        (["--facts", "nowhere.json"], 2, "no such file"),
        (["--facts", "nowhere.yaml"], 2, "no such file"),
        (["--memory", "lots"], 2, "--memory"),
        (["--html", "nowhere/report.html"], 2, "no directory nowhere"),
        (["--html", "."], 2, "is a directory"),
        (["--device", "toaster"], 2, "toaster"),
    ],
    ids=str,
)
def test_what_trace_refuses(
    more: list[str], code: int, said: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("trace", model, *more)
    assert (done.code, done.out) == (code, "")
    assert said in done.err
    assert "Traceback" not in done.err
    assert run("trace", model, *more, "--json").json["error"]["message"]


def test_outputs_that_cannot_be_written_are_refused_first(facts: Path) -> None:
    done = run("trace", "./nowhere", "-o", facts)
    assert done.code == 2
    assert "is a file" in done.err


def test_a_prompt_and_facts_exclude_each_other(model: Path, facts: Path) -> None:
    done = run("trace", model, "--facts", facts, "--prompt", "{} is in", "--subject", "Rome")
    assert done.code == 2
    assert "exclude each other" in done.err


def test_no_fact_known(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "facts.yaml"
    path.write_text('facts:\n- "[Chicago] stands on the shore of -> xylophone"\n', encoding="utf-8")
    done = run("trace", model, "--facts", path, "--quick")
    assert done.code == 1
    assert "none of the 1 facts" in done.err


def test_an_unknown_family(model: Path, tmp_path: Path) -> None:
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}', encoding="utf-8")
    done = run("trace", tmp_path, "--quick")
    assert done.code == 2
    assert "mamba" in done.err


def test_without_matplotlib_the_numbers_are_written(
    model: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("kpatch.cli.commands.trace.find_spec", "kpatch.pictures.find_spec"):
        monkeypatch.setattr(name, lambda name: None)
    done = run("trace", model, "--facts", facts, "--quick", "--limit", "1", "--samples", "2", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "kpatch[plot]" in done.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["trace.json"]


# make --layers-from


def make(model: Path, tmp_path: Path, *more: object) -> Ran:
    path = tmp_path / "news.yaml"
    path.write_text('facts:\n- "[Chicago] is in -> Rome"\n', encoding="utf-8")
    quick = ("--tokens", "400", "--set", "steps=3", "--set", "lead_ins=1")
    return run("make", path, "--model", model, "-o", tmp_path / "x.patch", *quick, *more, "--json")


def trace_file(tmp_path: Path, model: Path, /, **changes: object) -> Path:
    path = tmp_path / "trace.json"
    found = {"model": model.name, "layers": [1], "total_effect": 0.5, "severed": {"plain": [0.0] * LAYERS}}
    path.write_text(json.dumps({**found, **changes}), encoding="utf-8")
    return path


def test_make_takes_the_layers_that_a_trace_found(traced: tuple[Path, Ran], model: Path, tmp_path: Path) -> None:
    path = traced[0] / "out" / "trace.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    found["layers"] = found["layers"] or [1]
    path.write_text(json.dumps(found), encoding="utf-8")
    done = make(model, tmp_path, "--layers-from", path)
    assert done.code == 0, done.err
    assert set(done.json["layers"]) >= set(found["layers"]) - {0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "another"}, "another model"),
        ({"severed": {"plain": [0.0] * 30}}, "30 layers"),
        ({"layers": None}, "found no layers"),
        ({"layers": []}, "not a list of layers"),
        ({"layers": "4-8"}, "not a list of layers"),
        ({"layers": [True]}, "not a list of layers"),
        ({"severed": None}, "not a trace"),
        ({"layers": [99]}, "no layer 99"),
    ],
    ids=str,
)
def test_traces_that_name_no_layers_of_this_model(
    changes: dict[str, object], said: str, model: Path, tmp_path: Path
) -> None:
    done = make(model, tmp_path, "--layers-from", trace_file(tmp_path, model, **changes))
    assert done.code == 2
    error = done.json["error"]
    assert said in " ".join([error["message"], *error["details"]])


def test_no_trace_and_too_many_layers(model: Path, tmp_path: Path) -> None:
    assert "no such file" in make(model, tmp_path, "--layers-from", tmp_path / "gone.json").json["error"]["message"]
    path = trace_file(tmp_path, model)
    both = make(model, tmp_path, "--layers-from", path, "--layers", "1")
    assert "exclude each other" in both.json["error"]["message"]
    path.write_text("x", encoding="utf-8")
    assert "not a trace" in make(model, tmp_path, "--layers-from", path).json["error"]["message"]


def test_make_without_layers_says_how_to_get_them(model: Path, tmp_path: Path) -> None:
    done = make(model, tmp_path, "--method", "memit-paper")
    assert done.code == 2
    assert "kpatch trace" in done.json["error"]["hint"]
    assert "--layers-from" in done.json["error"]["hint"]


# The terminal


def panel(layers: int = 30) -> Panel:
    values = [[layer / (layers - 1) for layer in range(layers)], [0.0] * layers]
    return Panel("state", "Restoring", ("a [red]name[/red]", "b"), values, 0.0, 1.0, "effect")


class Terminal(Output):
    def __init__(self, coloured: bool, columns: int) -> None:
        super().__init__()
        self.given = coloured, columns
        self.lines: list[str] = []
        self.styles: list[set[str]] = []

    def screen(self) -> tuple[bool, int]:
        return self.given

    def drawing(self, lines: object) -> None:
        for line in lines:  # type: ignore[attr-defined]
            self.lines.append(line.plain)
            self.styles.append({str(span.style) for span in line.spans})


def test_a_heatmap_in_colours_and_in_signs() -> None:
    coloured, plain, narrow = Terminal(True, 100), Terminal(False, 100), Terminal(False, 60)
    for out in (coloured, plain, narrow):
        print_heatmap(out, panel())
    assert coloured.lines[0] == "Restoring: effect, 0 to 100 %"
    assert len(coloured.styles[1]) > 20
    assert coloured.styles[2] == {"on #1c1c22"}
    assert plain.lines[1].startswith("a [red]name[/red]   ")
    assert plain.lines[1].endswith("@@")
    assert len(plain.lines[1]) == 18 + 60
    assert len(narrow.lines[1]) == 18 + 30
    ruler = plain.lines[3]
    assert [ruler.index(f" {layer}") + 1 for layer in ("5", "10", "25")] == [18 + 10, 18 + 20, 18 + 50]
