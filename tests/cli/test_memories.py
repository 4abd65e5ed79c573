"""`kpatch memories` and `show --memories` from the outside, on a tiny random model."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.support import checkpoints
from tests.support.cli import Light, Ran, run
from tests.support.models import LAYERS, tiny
from tests.support.saved import save_model
from tests.support.tokenizers import TEXT

SMALL = ("--tokens", "300", "--inputs", "10", "--sample", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    path.write_text(TEXT * 4 + "<script>alert(1)</script> " * 20, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def looked(model: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    folder = tmp_path_factory.mktemp("looked")
    with pytest.MonkeyPatch.context() as context:
        context.setenv("KPATCH_CACHE", str(folder / "cache"))
        files = ("--plot", folder / "pictures", "--html", folder / "page.html")
        return folder, run("memories", model, "--corpus", words, *SMALL, *files, "--json")


def test_the_json_of_memories(looked: tuple[Path, Ran], model: Path) -> None:
    folder, done = looked
    assert done.code == 0, done.err
    data = done.json
    assert (data["model"], data["corpus"], data["tokens"], data["row"]) == (model.name, "words.txt", 300, 128)
    assert [layer["layer"] for layer in data["layers"]] == list(range(LAYERS))
    layer = data["layers"][0]
    assert 0 <= layer["agreement"] <= 1
    assert sum(layer["predictions"].values()) == pytest.approx(1)
    assert set(layer["removal"]) == {"first", "last", "other"}
    assert len(data["units"]) == 2 * LAYERS
    side = data["units"][0]["sides"][0]
    assert side["triggers"][0]["removal"]["last"] is not None
    assert side["triggers"][0]["text"].endswith(side["triggers"][0]["last"])
    assert side["agrees"] == (side["rank_of_following"] == 1)
    names = ("memories.png", "memories.svg", "predictions.png", "predictions.svg")
    assert data["files"] == [*(str(folder / "pictures" / name) for name in names), str(folder / "page.html")]
    assert all(Path(path).stat().st_size > 2000 for path in data["files"])


def test_the_page_is_whole_and_escapes_what_the_text_says(looked: tuple[Path, Ran]) -> None:
    page = (looked[0] / "page.html").read_text(encoding="utf-8")
    open_tags: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in {"meta", "line", "polyline"}:
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

        def handle_startendtag(self, tag: str, attrs: object) -> None:
            assert tag in {"line", "polyline"}

    Parser().feed(page)
    assert open_tags == []
    assert "<script" not in page
    assert page.count("<svg") == 8
    assert "http" not in page


def test_memories_tell_people(model: Path, words: Path) -> None:
    done = run("memories", model, "--corpus", words, *SMALL)
    assert done.code == 0, done.err
    for said in ("Agreement", "No single memory's", "Strongest trigger", "more units", "300 tokens of words.txt"):
        assert said in done.out, said
    assert "\x1b" not in done.out
    again = run("memories", model, "--corpus", words, *SMALL, "-v")
    assert "from the cache" in again.err
    assert again.out.count("\n") > done.out.count("\n")


def test_units_by_name(model: Path, words: Path) -> None:
    done = run("memories", model, "--corpus", words, *SMALL, "--units", "2.7,1.3")
    assert done.code == 0, done.err
    assert re.findall(r"^(\S+)  v promotes", done.out, re.M) == ["1.3", "2.7"]
    assert "−v promotes" in done.out
    assert "− last" in done.out
    json = run("memories", model, "--corpus", words, *SMALL, "--units", "2.7", "--json").json
    assert [layer["layer"] for layer in json["layers"]] == [2]
    assert [(unit["layer"], unit["unit"]) for unit in json["units"]] == [(2, 7)]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--units", "12"], "--units 12.345"),
        (["--units", "9.1"], "no unit 9.1"),
        (["--units", "1.9999"], "from 0 to 63"),
        (["--layers", "7"], "no layer 7"),
        (["--tokens", "2"], "--tokens 2"),
        (["--tokens", "900000", "--corpus", "WORDS"], "less text than asked for"),
        (["--inputs", "0"], "--inputs"),
        (["--removals", "-1"], "--removals"),
        (["--corpus", "nowhere.txt"], "not found"),
        (["--plot", "WORDS"], "is a file"),
        (["--html", "nowhere/page.html"], "no directory nowhere"),
        (["--html", "."], "is a directory"),
        (["--device", "toaster"], "toaster"),
    ],
    ids=str,
)
def test_what_memories_refuses(
    more: list[str], said: str, model: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(words) if part == "WORDS" else part for part in more]
    done = run("memories", model, *given)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert "Traceback" not in done.err
    assert run("memories", model, *given, "--json").json["error"]["message"]


def test_pictures_without_matplotlib_are_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kpatch.cli.commands.memories.find_spec", lambda name: None)
    done = run("memories", "./nowhere", "--plot", "pictures")
    assert done.code == 2
    assert "kpatch[plot]" in done.err


# show --memories


@pytest.fixture
def patch(model: Path, tmp_path: Path) -> Path:
    facts = [{"subject": f"Town {number}", "prompt": "{} lies in", "target": "Peru"} for number in range(7)]
    weights = [tiny("llama").weight_name(layer) for layer in (0, 1, 2)]
    checkpoints.make_patch(tmp_path / "x.patch", model, weights=weights, facts=facts)
    return tmp_path / "x.patch"


def test_show_with_memories(patch: Path, model: Path) -> None:
    plain = run("show", patch)
    done = run("show", patch, "--memories", model)
    assert done.code == 0, done.err
    assert done.out.startswith(plain.out)
    assert "Town 0 lies in → Peru" in done.out
    assert "Written value promotes" in done.out
    assert "2 more facts (-v shows all)" in done.out
    assert "Town 6 lies in → Peru" in run("show", patch, "--memories", model, "-v").out
    data = run("show", patch, "--memories", model, "--json").json
    assert len(data["memories"]) == len(data["facts"]) == 7
    first = data["memories"][0]["layers"][0]
    assert len(first["units"]) == 3
    assert first["units"][0]["before"][0].keys() == {"token", "probability"}
    assert "memories" not in run("show", patch, "--json").json


def test_show_with_memories_of_another_model(patch: Path, tmp_path: Path) -> None:
    other = tiny("llama", seed=4)
    other.net.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    done = run("show", patch, "--memories", tmp_path / "other")
    assert done.code == 3
    assert "not the base it was made for" in done.err


def test_show_without_memories_stays_light(patch: Path, light: Light) -> None:
    assert light.run("show", patch, "-q", "--json").code == 0
