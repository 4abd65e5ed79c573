"""A patch on top of others: earlier facts about the same subject are learned again, and what they lose is reported."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kpatch
from kpatch.edit import memit
from kpatch.edit.earlier import facts_of, facts_that_stay, facts_to_hold, facts_to_learn_again, protected
from kpatch.edit.make import make
from kpatch.edit.mend import Mend
from kpatch.edit.methods import Inputs, hyper_for
from kpatch.evaluate.metrics import Measurement, measure
from kpatch.evaluate.retention import retention
from kpatch.facts.fact import Fact, Protected
from kpatch.models.model import open_model
from kpatch.patch.format import Patch, read_patch
from tests.support.cli import run
from tests.support.editors import save_editor
from tests.support.models import tiny
from tests.support.reports import Recorder

pytestmark = pytest.mark.usefixtures("shared_statistics")

FIRST = [
    Fact("Mona Lisa", "In the {}", "Paris", id="mona"),
    Fact("Moonlight Sonata", "By the {}", "Brazil", id="moon"),
]
SECOND = [Fact("Mona  Lisa", "Past the {} is", "Rome", id="past")]
QUICK: dict[str, Any] = {
    "layers": [1, 2],
    "tokens": 400,
    # Not refined, which would hold earlier facts by itself
    "settings": {"steps": "25", "lead_ins": "0", "leverage": "50000", "clamp": "3", "refine": "0"},
}


@pytest.fixture(scope="module")
def carrying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint that carries a patch with FIRST."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("earlier")
    directory, model = folder / "model", tiny("llama")
    model.net.save_pretrained(directory)
    model.tokenizer.save_pretrained(directory)
    with pytest.MonkeyPatch.context() as context:
        context.setenv("KPATCH_CACHE", str(folder / "cache"))
        make(FIRST, out=folder / "first.patch", model=str(directory), **QUICK)
        kpatch.apply([folder / "first.patch"], directory)
        yield directory


@pytest.fixture
def first(carrying: Path) -> Patch:
    return read_patch(carrying.parent / "first.patch")


def test_an_earlier_fact_about_the_same_subject_is_kept(
    carrying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = make(SECOND, out=tmp_path / "a.patch", on=carrying, **QUICK)
    assert kept.facts[0]["after"]["probability"] > kept.facts[0]["before"]["probability"]
    assert kept.retention is not None
    assert (kept.retention.n, kept.retention.held, kept.retention.kept) == (2, 1, 1)
    patch = read_patch(tmp_path / "a.patch")
    assert [fact["id"] for fact in patch.manifest.facts] == ["past"]
    assert [group["facts"] for group in patch.manifest.groups if group["facts"]] == [[0], [0]]

    monkeypatch.setattr(memit, "facts_to_learn_again", lambda *given: [])
    lost = make(SECOND, out=tmp_path / "b.patch", on=carrying, **QUICK)
    assert lost.retention is not None
    assert lost.retention.rate == 0
    (fallen,) = lost.retention.fallen
    assert fallen["text"] == "In the Mona Lisa"
    assert fallen["after"] < fallen["before"]


def test_which_earlier_facts_are_learned_again(first: Patch) -> None:
    heard = Recorder()
    assert [fact.id for fact in facts_of([first])] == ["mona", "moon"]
    assert [fact.id for fact in facts_to_learn_again([first], SECOND, heard)] == ["mona"]
    assert "1 earlier fact about" in heard.notes[0]
    assert facts_to_learn_again([first], [Fact("Chicago", "In {}", "Rome")], heard) == []


def test_an_earlier_fact_that_is_contradicted_is_not_learned_again(first: Patch) -> None:
    heard = Recorder()
    assert facts_to_learn_again([first], [Fact("Mona Lisa", "In the {}", "Rome")], heard) == []
    assert "contradicts 'In the Mona Lisa'" in heard.warnings[0]


@pytest.mark.parametrize(
    ("fact", "again"),
    [
        (Fact("The Mona Lisa", "{} is near", "Rome"), True),  # the same text to the subject's end
        (Fact("the Mona Lisa", "Near {}, the", "Rome"), True),
        (Fact("Lisa", "In the Mona {}, a", "Rome"), True),
        (Fact("mona lisa", "Near the {}, the", "Rome"), False),  # other tokens, another key
        (Fact("Lisa", "Near the {}, the", "Rome"), False),
    ],
)
def test_an_earlier_fact_that_shares_a_key_is_about_the_same_subject(first: Patch, fact: Fact, again: bool) -> None:
    assert [one.id for one in facts_to_learn_again([first], [fact])] == (["mona"] if again else [])
    held = [one.id for some in facts_to_hold([first], [fact]) for one in some]
    assert held == (["moon"] if again else ["mona", "moon"])


def test_a_contradicted_sentence_is_neither_held_nor_learned_again_nor_measured(first: Patch) -> None:
    heard, fact = Recorder(), Fact("the Mona Lisa", "In {}", "Rome")
    assert facts_to_learn_again([first], [fact], heard) == []
    assert "contradicts 'In the Mona Lisa'" in heard.warnings[0]
    assert [[one.id for one in some] for some in facts_to_hold([first], [fact])] == [["moon"]]
    assert [one.id for one in facts_that_stay([first], [fact])] == ["moon"]


@pytest.mark.parametrize(
    ("fact", "settings"),
    [(Fact("the Mona Lisa", "In {}, said the man, is", "Rome", id="past"), {}), (SECOND[0], {"method": "ft"})],
)
def test_an_earlier_fact_under_another_name_or_method_is_kept(
    carrying: Path, tmp_path: Path, fact: Fact, settings: dict[str, Any]
) -> None:
    how = {"method": "ft", "layers": [1]} if settings else QUICK
    heard = Recorder()
    kept = make([fact], out=tmp_path / "a.patch", on=carrying, report=heard, **how)
    assert any("1 earlier fact about the same subjects is learned again" in note for note in heard.notes)
    assert kept.retention is not None
    assert (kept.retention.held, kept.retention.kept) == (1, 1)
    assert [one["id"] for one in read_patch(tmp_path / "a.patch").manifest.facts] == ["past"]


def test_rome_writes_an_earlier_fact_about_the_same_subject_again(carrying: Path, tmp_path: Path) -> None:
    how = {"layers": [1], "tokens": 400, "settings": {"steps": "2", "prefixes": "0"}}
    make(SECOND, out=tmp_path / "a.patch", on=carrying, method="rome", **how)
    patch = read_patch(tmp_path / "a.patch")
    assert [group["facts"] for group in patch.manifest.groups] == [[], [0]]
    assert patch.keys[1].shape[0] == 2


def test_mend_takes_the_gradient_of_an_earlier_fact_about_the_same_subject_too(carrying: Path, tmp_path: Path) -> None:
    model = open_model(str(carrying))
    method = Mend().with_editor(save_editor(tmp_path / "editor.safetensors", model, [2]))
    hyper = hyper_for(method, model, None, {})
    (earlier,) = (fact for fact in FIRST if fact.id == "mona")
    on = (read_patch(carrying.parent / "first.patch"),)
    found = method.edit(model, SECOND, hyper, Inputs(on=on)).deltas
    both = method.edit(model, [*SECOND, earlier], hyper, Inputs()).deltas
    alone = method.edit(model, SECOND, hyper, Inputs()).deltas
    for name, delta in found.items():
        torch.testing.assert_close(delta.dense(), both[name].dense())
        assert not torch.allclose(delta.dense(), alone[name].dense())


def test_a_fact_that_stands_for_an_earlier_one_does_what_was_measured(carrying: Path, tmp_path: Path) -> None:
    """The patch on top has no key of the fact that it contradicts in its C: there is nothing to take out of it."""
    made = make([Fact("Mona Lisa", "In the {}", "Rome")], out=tmp_path / "a.patch", on=carrying, **QUICK)
    assert made.retention is not None
    assert made.retention.n == 1, "what is contradicted is not lost, but replaced"
    model = tmp_path / "model"
    shutil.copytree(carrying, model)
    kpatch.apply([tmp_path / "a.patch"], model, replace=True)
    base = tiny("llama")
    found = open_model(str(model))
    for layer in (1, 2):
        change = (found.weight(layer) - base.weight(layer)).norm() / base.weight(layer).norm()
        assert change < 1
    after = measure(found, [Fact("Mona Lisa", "In the {}", "Rome")]).facts[0]["probability"]
    assert after == pytest.approx(made.facts[0]["after"]["probability"], rel=0.3)


def test_facts_about_other_subjects_are_held_patch_by_patch(first: Patch) -> None:
    assert [[fact.id for fact in some] for some in facts_to_hold([first], SECOND)] == [["moon"]]
    other = [Fact("Chicago", "In {}", "Rome")]
    assert [[fact.id for fact in some] for some in facts_to_hold([first, first], other)] == [["mona", "moon"]] * 2
    assert facts_to_hold([first], other, gone={first.id: {0, 1}}) == []


def test_whom_earlier_patches_protect_stays_protected(first: Patch) -> None:
    theirs, own = Protected("Rome", "In {}", 2.0), Protected("Brazil")
    other = replace(first, manifest=replace(first.manifest, protect=(theirs.to_dict(), own.to_dict())))
    assert protected([own], [first, other], SECOND) == (own, theirs)
    assert protected([], [other], [Fact("Rome", "Past {}", "Paris")]) == (own,)


def measured(*rows: tuple[str, bool, float]) -> Measurement:
    facts = ({"id": name, "text": name, "target": "x", "accurate": right, "probability": p} for name, right, p in rows)
    return Measurement({}, tuple(facts), ())


def test_retention_by_hand() -> None:
    before = measured(("a", True, 0.9), ("b", True, 0.8), ("c", True, 0.9), ("d", False, 0.1))
    found = retention(before, measured(("a", True, 0.7), ("b", False, 0.4), ("c", False, 0.1), ("d", True, 0.6)))
    assert (found.n, found.held, found.kept) == (4, 3, 1)
    assert found.rate == pytest.approx(1 / 3)
    assert [fact["id"] for fact in found.fallen] == ["c", "b"], "the hardest hit first"
    assert retention(measured(("d", False, 0.1)), measured(("d", True, 0.6))).rate is None
    with pytest.raises(ValueError, match="different facts"):
        retention(measured(("a", True, 1.0)), measured(("b", True, 1.0)))


def test_min_retention_from_the_command_line(carrying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = tmp_path / "facts.yaml"
    facts.write_text('facts:\n  - {subject: Mona Lisa, prompt: "Past the {} is", target: Rome}\n', encoding="utf-8")
    settings = [word for key, value in QUICK["settings"].items() for word in ("--set", f"{key}={value}")]
    words = ["make", facts, "--on", carrying, "--layers", "1-2", "--tokens", "400", *settings, "--min-retention", "1"]
    done = run(*words, "-o", tmp_path / "a.patch", "--json")
    assert done.code == 0
    assert done.json["retention"]["rate"] == 1
    monkeypatch.setattr(memit, "facts_to_learn_again", lambda *given: [])
    done = run(*words, "-o", tmp_path / "b.patch")
    assert done.code == 1
    assert "0 of the 1 that held still hold" in done.out
    assert "retention: expected at least 100.0 %, found 0.0 %" in done.err
    assert "no longer holds: In the Mona Lisa Paris" in done.err
    assert run("make", facts, "--model", carrying, "--min-retention", "1").code == 2


def test_min_retention_where_no_earlier_fact_could_be_lost(carrying: Path, tmp_path: Path) -> None:
    facts = tmp_path / "facts.yaml"
    facts.write_text('facts:\n  - {subject: Mona Lisa, prompt: "In the {}", target: Rome}\n', encoding="utf-8")
    words = ["make", facts, "--on", carrying, "--layers", "1", "--tokens", "400", "--set", "steps=1"]
    done = run(*words, "--min-retention", "1", "-o", tmp_path / "a.patch")
    assert done.code == 0, "the one that held is contradicted, and to be replaced"
    assert "no earlier fact held before" in done.err


def test_status_measures_which_facts_hold(carrying: Path, first: Patch, tmp_path: Path) -> None:
    found = run("status", carrying, "--measure", "--json").json["health"]
    assert [(one["id"], one["name"], one["facts"]) for one in found] == [(first.id, "first", 2)]
    fallen = {fact["text"] for fact in found[0]["fallen"]}
    assert found[0]["held"] == 2 - len(fallen)
    accurate = {fact["text"]: fact["after"]["accurate"] for fact in (first.manifest.effect or {})["facts"]}
    assert fallen == {text for text, holds in accurate.items() if not holds}
    assert "of 2" in run("status", carrying, "--measure").out
    assert "health" not in run("status", carrying, "--json").json
