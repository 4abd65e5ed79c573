"""Averages, the JSON object, pictures and the report, from made traces with plain answers."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from kpatch import pictures
from kpatch.errors import BadInput, KpatchError
from kpatch.facts.fact import Fact
from kpatch.trace import plot
from kpatch.trace.files import write_folder, write_html
from kpatch.trace.html import _ticks, report_html
from kpatch.trace.panels import (
    curves_panel,
    dark,
    describe_range,
    fact_panels,
    hex_of,
    label,
    on_dark,
    on_white,
    panels,
)
from kpatch.trace.run import FactTrace, Traces, TraceSettings
from kpatch.trace.summary import ROLES, Summary

LAYERS = 12
TOKENS = ("The", " <b>", " Needle", " is", " in", " $x$")


def made(facts: int = 5, quick: bool = False, layers: int = LAYERS, subject: str = "Space Needle") -> Traces:
    """Facts that all carry their answer at the subject's last token up to layer 5, in MLPs, and at the end above."""
    found = []
    for number in range(facts):
        corrupted, clean = 0.1 + 0.01 * number, 0.8
        state = torch.full((len(TOKENS), layers), corrupted, dtype=torch.float64)
        state[2, :6] = 0.7
        state[5, 6:] = clean
        plain = state[2]
        severed = torch.where(torch.arange(layers) < 4, corrupted + 0.1, plain)
        curves = torch.stack([plain, severed, plain - 0.05])
        grids = {} if quick else {"state": state, "mlp": state.clone() * 0.9, "attn": state.clone() * 0.5}
        fact = Fact(subject, "The {} is in", "Seattle", id=f"f{number}")
        found.append(FactTrace(fact, "Seattle", TOKENS, 1, 2, clean, corrupted, grids, curves))
    return Traces("tiny & <co>", layers, TraceSettings(quick=quick), 0.12, 2 * facts, tuple(found), 1.5)


def test_averages() -> None:
    summary = Summary(made())
    assert float(summary.total_effect.mean) == pytest.approx(0.8 - 0.12)
    mean = summary.effects["state"].mean
    assert mean.shape == (len(ROLES), LAYERS)
    assert mean[2, 0].item() == pytest.approx(0.7 - 0.12)
    assert mean[2, 6].item() == pytest.approx(0.0)
    assert mean[5, 11].item() == pytest.approx(0.8 - 0.12)
    assert mean[0].abs().max().item() == pytest.approx(0.0)
    assert mean[1].isnan().all(), "no fact has a middle token"
    assert summary.role_counts == [5, 0, 5, 5, 5, 5]
    low, high = summary.effects["state"].low[2, 0], summary.effects["state"].high[2, 0]
    assert 0.7 - 0.14 <= low < mean[2, 0] < high <= 0.7 - 0.10
    assert summary.curves.mean[1, 0].item() == pytest.approx(0.1)


def test_layers_and_their_stability() -> None:
    summary = Summary(made(layers=30))
    assert summary.range is not None
    assert (summary.range.first, summary.range.last) == (0, 3)
    assert summary.stability is not None
    assert summary.stability.same == 1.0
    assert "R = 0–3 (4 of 30 layers)" in describe_range(summary)
    assert "100 % of 1,000 resamples" in describe_range(summary)


def test_one_fact_has_no_interval_and_no_stability() -> None:
    summary = Summary(made(1))
    assert summary.stability is None
    assert summary.curves.low.isnan().all()
    assert "from one fact only" in describe_range(summary)


def test_no_layers_stand_out() -> None:
    traces = made()
    for fact in traces.facts:
        fact.curves[1] = fact.curves[0]
    summary = Summary(traces)
    assert summary.range is None
    assert "No layers to edit" in describe_range(summary)
    assert summary.to_dict()["layers"] is None
    assert summary.to_dict()["range"] is None


def test_the_json_object(tmp_path: Path) -> None:
    files = write_folder(Summary(made()), tmp_path / "new" / "trace")
    assert [path.name for path in files] == ["trace.json", "effects.png", "effects.svg", "severed.png", "severed.svg"]
    data = json.loads(files[0].read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))
    assert data["schema_version"] == 1
    keys = {"model", "facts", "noise", "layers", "total_effect", "effects", "severed", "files", "seconds"}
    assert keys <= set(data)
    assert (data["model"], data["facts"], data["noise"]) == ("tiny & <co>", {"tried": 10, "kept": 5}, 3.0)
    assert set(data["effects"]) == {"states", "mlp", "attn"}
    for grid in data["effects"].values():
        assert grid["roles"] == list(ROLES)
        for key in ("mean", "low", "high"):
            assert [len(row) for row in grid[key]] == [LAYERS] * len(ROLES)
        assert grid["mean"][1] == [None] * LAYERS
    assert {name: len(curve) for name, curve in data["severed"].items()} == dict.fromkeys(
        ("plain", "mlp", "attn"), LAYERS
    )
    assert data["files"] == [str(path) for path in files]
    assert len(data["per_fact"]) == 5
    assert data["per_fact"][0]["tokens"] == list(TOKENS)
    assert len(data["per_fact"][0]["probabilities"]["states"]) == len(TOKENS)
    assert 0 <= data["range"]["stability"]["same"] <= 1


def test_a_quick_trace_has_no_grids(tmp_path: Path) -> None:
    summary = Summary(made(quick=True))
    assert summary.to_dict()["effects"] == {"states": None, "mlp": None, "attn": None}
    assert panels(summary) == []
    names = [path.name for path in write_folder(summary, tmp_path)]
    assert names == ["trace.json", "severed.png", "severed.svg"]
    assert "What restoring brings back" not in report_html(summary)


def test_the_colour_scale_is_shared() -> None:
    shown = panels(Summary(made()))
    assert [panel.kind for panel in shown] == ["state", "mlp", "attn"]
    assert {(panel.low, panel.high) for panel in shown} == {(0.0, shown[0].high)}
    assert shown[0].high == pytest.approx(0.8 - 0.12)
    assert "middle subject tokens" not in shown[0].rows, "no fact has one"
    single = fact_panels(made(1).facts[0], 10)
    assert {(panel.low, panel.high) for panel in single} == {(0.1, 0.8)}
    assert single[0].rows == ("The", "<b>*", "Needle*", "is", "in", "$x$")
    assert single[0].quantity == "P(Seattle)"
    assert curves_panel(Summary(made())).rows == ("plain", "MLP severed", "attention severed")


def test_labels_of_tokens() -> None:
    assert [label(token) for token in (" in", " ", "\n", "", "x" * 30)] == ["in", "␣", "⏎", "∅", f"{'x' * 15}…"]


@pytest.mark.parametrize("facts", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_pictures(facts: int, tmp_path: Path) -> None:
    for path in plot.draw(Summary(made(facts)), tmp_path):
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
        else:
            assert ElementTree.fromstring(path.read_text(encoding="utf-8")).tag.endswith("svg")
    again = tmp_path / "again"
    again.mkdir()
    for path in plot.draw(Summary(made(facts)), again):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), "the same trace, the same picture"


def test_signs_that_the_font_lacks_are_no_error(tmp_path: Path) -> None:
    traces = made(1)
    fact = traces.facts[0]
    named = replace(fact, answer="東京", tokens=("東",) * 6)
    assert plot.draw(Summary(replace(traces, facts=(named,))), tmp_path)


def test_pictures_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="matplotlib") as caught:
        plot.draw(Summary(made()), tmp_path)
    assert "kpatch[plot]" in (caught.value.hint or "")
    assert [path.name for path in write_folder(Summary(made()), tmp_path)] == ["trace.json"]


class Page(HTMLParser):
    """Collects what a page loads, and checks that its tags close."""

    VOID = frozenset({"meta"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [f"{tag} {value}" for name, value in attrs if name in ("src", "href")]
        if tag in ("script", "link", "iframe", "img"):
            self.loads.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        return None

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.parametrize("facts", [1, 5])
def test_the_report_is_one_file_that_loads_nothing(facts: int, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_html(Summary(made(facts, subject="<script>alert(1)</script>")), path)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.loads == []
    assert "url(" not in text
    words = " ".join(page.words)
    for said in ("tiny & <co>", "R = ", "MLP severed", "Restoring 10 MLP outputs", "The <script>", "Seattle", "<b>*"):
        assert said in words, said
    classes = set(re.findall(r"<td class=([sma]\d+)>", text))
    assert len(classes) > 3
    for name in classes:
        assert f".{name} {{" in text, "every shade is defined"


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 0.77, [0, 0.2, 0.4, 0.6, 0.8]),
        (-0.02, 0.5, [-0.1, 0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        (0.0, 0.01, [0, 0.002, 0.004, 0.006, 0.008, 0.01]),
    ],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert _ticks(low, high) == pytest.approx(ticks)


def test_colours() -> None:
    assert hex_of(on_white("state", 0)) == "#ffffff"
    assert on_white("mlp", 5) == on_white("mlp", 1)
    assert on_white("attn", float("nan")) == (255, 255, 255)
    for kind in ("state", "mlp", "attn"):
        light = [sum(on_white(kind, step / 10)) for step in range(11)]
        assert light == sorted(light, reverse=True)
        bright = [sum(on_dark(kind, step / 10)) for step in range(11)]
        assert bright == sorted(bright)
        assert dark(on_white(kind, 1))
        assert not dark(on_white(kind, 0))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(KpatchError):
        write_folder(Summary(made()), tmp_path / "file" / "trace")
