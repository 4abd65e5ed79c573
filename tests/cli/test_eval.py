"""eval from the outside, on a tiny random model that is a checkpoint directory like any other."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kpatch.checkpoint.apply import apply
from kpatch.cli.html import _scatter
from kpatch.cli.tables import failures
from tests.support import checkpoints
from tests.support.cli import run
from tests.support.models import tiny
from tests.support.saved import save_facts, save_model, save_patch

FACTS = [
    {
        "subject": "Eiffel Tower",
        "prompt": "The {} is in",
        "target": "Rome",
        "was": "Paris",
        "paraphrases": ["{} stands in"],
        "neighbors": ["The Louvre is in -> Paris"],
        "references": ["Rome is a city."],
    },
    {"subject": "Chicago", "prompt": "The city {} lies in", "target": "<b>Brazil</b>", "was": "Paris"},
    {"subject": "Chicago", "prompt": "The city {} lies in", "target": "Rome", "was": "Paris"},
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


def test_the_json_of_eval(model: Path, facts: Path) -> None:
    done = run("eval", facts, model, "--json", "--samples", "50")
    assert done.code == 0, done.err
    data = done.json
    assert (data["model"], data["patches"], data["evaluated"], data["unpatched"]) == (model.name, [], 3, None)
    metrics = data["metrics"]
    for kind, count in (("efficacy", 3), ("generalization", 1), ("specificity", 1)):
        assert set(metrics[kind]) >= {"success", "magnitude", "accuracy", "n", "interval"}
        assert metrics[kind]["n"] == count
    low, high = metrics["efficacy"]["interval"]
    assert 0 <= low <= metrics["efficacy"]["success"] <= high <= 1
    assert "score" in metrics
    assert (data["fluency"], data["consistency"], data["perplexity"]) == (None, None, None)
    assert "facts" not in data
    assert "Chicago" in done.err, "facts that contradict are told, and asked all the same"


def test_a_patch_beside_the_model_without(model: Path, facts: Path, patch: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The capital of France is Paris. " * 20, encoding="utf-8")
    more = ("--generate", "--length", "16", "--text", tmp_path / "text.txt", "--text-tokens", "64", "--per-fact")
    done = run("eval", facts, model, "--patch", patch, *more, "--samples", "50", "--json")
    assert done.code == 0, done.err
    data, alone = done.json, run("eval", facts, model, *more, "--samples", "50", "--json").json
    assert data["patches"] == ["news"]
    assert {key: data["unpatched"][key] for key in data["metrics"]} == alone["metrics"]
    assert data["unpatched"]["fluency"] == alone["fluency"]
    assert data["metrics"] != alone["metrics"]
    assert 0 <= data["fluency"] != data["unpatched"]["fluency"]
    assert (data["compared"], data["consistency"] is not None) == (1, True)
    assert 0 <= data["repetition"] <= 1
    assert data["perplexity"]["before"] == alone["perplexity"]["after"] != data["perplexity"]["after"]
    assert data["perplexity"]["drift"] == pytest.approx(data["perplexity"]["after"] / data["perplexity"]["before"] - 1)
    assert alone["perplexity"]["before"] is None
    assert [row["subject"] for row in data["facts"]] == ["Eiffel Tower", "Chicago", "Chicago"]
    assert set(data["facts"][0]) >= {"probability", "was_probability", "answer", "free_running", "written"}


def test_patches_that_a_checkpoint_carries(model: Path, facts: Path, patch: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    apply([patch], folder)
    carried = run("eval", facts, folder, "--json", "--samples", "50")
    tried = run("eval", facts, model, "--patch", patch, "--json", "--samples", "50")
    assert carried.code == tried.code == 0, carried.err
    assert carried.json["patches"] == ["news"]
    for key in ("metrics", "unpatched"):
        assert carried.json[key] == tried.json[key]
    assert carried.json["metrics"] != carried.json["unpatched"]


def test_several_patches(model: Path, facts: Path, patch: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.patch"
    checkpoints.make_patch(other, model, weights=[tiny("llama").weight_name(3)], seed=5, scale=2.0, keys=False)
    both = run("eval", facts, model, "--patch", patch, "--patch", other, "--json", "--samples", "0").json
    assert both["patches"] == ["news", "other"]
    one = run("eval", facts, model, "--patch", patch, "--json", "--samples", "0").json
    assert both["metrics"]["efficacy"] != one["metrics"]["efficacy"]


def test_eval_tells_people_in_a_table(model: Path, facts: Path, patch: Path) -> None:
    done = run("eval", facts, model, "--patch", patch, "--per-fact")
    for said in (
        "Efficacy",
        "Generalization",
        "Specificity",
        "Score",
        "Without",
        "With",
        "95 %",
        "have something wrong",
    ):
        assert said in done.out, said
    alone = run("eval", facts, model, "--limit", "1").out
    assert "Without" not in alone
    assert re.search(r"Efficacy +the edited prompts +1\b", alone)


def test_all_that_was_asked_for_is_in_the_table(model: Path, facts: Path, patch: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The city of Chicago lies in Brazil and the sea is cold.", encoding="utf-8")
    done = run(
        "eval", facts, model, "--patch", patch, "--generate", "--length", "12", "--text", text, "--samples", "9"
    )
    assert re.search(r"Fluency +bits, of what it writes +3( +\d\.\d{3}){2} +\d\.\d{3} – \d\.\d{3}", done.out), done.out
    assert re.search(r"Consistency +with texts about the targets +1( +\d\.\d{3}){2}", done.out), done.out
    assert re.search(r"Perplexity +of the text: [+-][\d.]+ % +[\d.]+ +[\d.]+", done.out), done.out


def test_a_neighbor_that_was_wrong_before_is_not_the_patch_s_fault() -> None:
    now: dict[str, Any] = {
        "success": True,
        "accurate": True,
        "paraphrases": [False],
        "neighbors": [False, False, None],
    }
    assert failures(now) == ["1 of 1 paraphrases", "2 of 3 neighbors"]
    for neighbors, said in (
        ([True, True, None], "2 of 3 neighbors"),
        ([False, True, None], "2 of 3 neighbors, 1 of them before"),
        ([False, False, None], "2 of 3 neighbors, before too"),
    ):
        assert failures(now, {**now, "neighbors": neighbors}) == ["1 of 1 paraphrases", said]


def test_probabilities_stand_on_logarithmic_axes() -> None:
    drawn = _scatter([{"text": "a", "target": "b", "probability": 1e-3, "was_probability": 0.0}], [])
    assert 'cx="50.0" cy="170.0"' in drawn


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--min-efficacy", "1", "efficacy"),
        ("--min-score", "1", "score"),
        ("--min-free-running", "1", "free running"),
        ("--min-fluency", "50", "fluency"),
        ("--min-consistency", "1", "consistency"),
        ("--max-perplexity-drift", "-0.99", "perplexity"),
    ],
)
def test_a_threshold_that_is_not_reached(
    option: str, value: str, named: str, model: Path, facts: Path, patch: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("The capital of France is Paris. " * 5, encoding="utf-8")
    more: list[Any] = ["--generate", "--length", "16"] if named in ("fluency", "consistency") else []
    more += ["--text", tmp_path / "text.txt"] if named == "perplexity" else []
    done = run("eval", facts, model, "--patch", patch, "--samples", "0", option, value, *more, "--json")
    assert done.code == 1, done.err
    error = done.json["error"]
    assert error["code"] == "check_failed"
    assert [line.partition(":")[0] for line in error["details"]] == [named]
    assert done.json["metrics"], "what was measured is told all the same"


def test_thresholds_that_are_reached(model: Path, facts: Path) -> None:
    assert run("eval", facts, model, "--samples", "0", "--min-efficacy", "0", "--min-specificity", "0").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--min-fluency", "3"), 2, "needs --generate"),
        (("--max-perplexity-drift", "0.1"), 2, "needs --text"),
        (("--limit", "1", "--min-specificity", "0.5"), 2, "cannot be checked"),
        (("--patch", "nowhere.patch"), 2, "nowhere.patch"),
        (("--text", "nowhere.txt"), 2, "corpus was not found"),
        (("--html", "facts.yaml"), 3, "exists"),
        (("--html", "no/where.html"), 2, "no directory"),
    ],
)
def test_what_eval_refuses(
    arguments: tuple[str, ...], code: int, said: str, model: Path, facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts.write_text(json.dumps({"facts": FACTS[1:2]}), encoding="utf-8")
    monkeypatch.chdir(facts.parent)
    done = run("eval", facts, model, *arguments)
    assert done.code == code, done.err
    assert said in done.err


def test_drift_needs_something_to_compare_with(model: Path, facts: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The capital of France is Paris. " * 5, encoding="utf-8")
    done = run("eval", facts, model, "--text", tmp_path / "text.txt", "--max-perplexity-drift", "0.1")
    assert done.code == 2
    assert "no patch" in done.err


class _Sound(HTMLParser):
    """Checks that tags are closed in order, and collects them."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.seen.add(tag)
        assert "src" not in dict(attributes)
        assert "href" not in dict(attributes)
        if tag not in ("meta", "line", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page(model: Path, facts: Path, patch: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    done = run("eval", facts, model, "--patch", patch, "--html", path, "--samples", "50")
    assert done.code == 0, done.err
    page = path.read_text(encoding="utf-8")
    reader = _Sound()
    reader.feed(page)
    assert not reader.open
    assert {"table", "svg", "circle", "rect"} <= reader.seen
    assert not {"script", "img", "link", "b"} & reader.seen, "texts are escaped, nothing is loaded"
    assert "<b>Brazil</b>" in reader.text
    assert "http" not in page
    for said in ("Efficacy", "Score", "with news", "The Eiffel Tower is in", "without patches"):
        assert said in reader.text
