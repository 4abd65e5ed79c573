"""Methods: which there are, how others are registered, and hyperparameters from presets, layers and settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from kpatch.edit import methods
from kpatch.edit.memit import Memit, default_layers
from kpatch.edit.methods import (
    Edit,
    Method,
    all_presets,
    hyper_for,
    method_named,
    method_names,
    preset_for,
    register,
    with_settings,
)
from kpatch.edit.presets import (
    PRESETS,
    SHAPES,
    AlphaEditHyper,
    FineTuneHyper,
    HyperParams,
    MemitHyper,
    MemitPaperHyper,
    Preset,
    RomeHyper,
)
from kpatch.edit.rome import Rome
from kpatch.errors import BadInput
from tests.support.models import LAYERS, WIDTH, tiny
from tests.support.reports import Recorder
from tests.support.templates import ALWAYS_THINKING, CHATML, DROPS, chatty

build = cache(tiny)
BASE = MemitHyper(layers=(1, 2))
MEMIT, PAPER, ROME, FT = (method_named(name) for name in ("memit", "memit-paper", "rome", "ft"))
ALPHA, BLUE = (method_named(name) for name in ("alphaedit", "blue"))


class Nothing(Method):
    """A method of another package."""

    name = "nothing"
    hyper = HyperParams

    def edit(self, model: Any, facts: Any, hyper: Any, inputs: Any) -> Edit:
        return Edit({}, hyper.layers)


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = dict(methods._registered)
    yield
    methods._registered.clear()
    methods._registered.update(before)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> MemitHyper:
    """A preset of MEMIT for the shape of the tiny llama, and ROME's one for smollm2."""
    hyper = MemitHyper(layers=(0, 2), clamp=0.4)
    monkeypatch.setitem(SHAPES, "smollm2", ("llama", WIDTH, LAYERS))
    monkeypatch.setattr(Memit, "presets", {"smollm2": Preset(hyper, "made for this test")})
    monkeypatch.setattr(Rome, "presets", {"smollm2": Preset(RomeHyper((1,)), "made for ROME")})
    return hyper


# Which methods there are


def test_kpatchs_own_methods() -> None:
    assert method_names()[:7] == ("memit", "memit-paper", "rome", "ft", "alphaedit", "blue", "mend")
    own = (MEMIT, PAPER, ROME, FT, ALPHA, BLUE)
    hypers = [MemitHyper, MemitPaperHyper, RomeHyper, FineTuneHyper, AlphaEditHyper, MemitPaperHyper]
    assert [method.hyper for method in own] == hypers
    assert [method.one_layer for method in own] == [False, False, True, True, False, False]


def test_a_method_of_another_package_is_found_by_its_name() -> None:
    register(Nothing)
    register(Nothing)  # an import that runs twice
    assert "nothing" in method_names()
    assert isinstance(method_named("nothing"), Nothing)


@pytest.mark.parametrize("taken", ["memit", "nothing"])
def test_a_name_is_given_once(taken: str) -> None:
    register(Nothing)
    other = type("Other", (Nothing,), {"name": taken})
    with pytest.raises(BadInput, match=f"There is a method '{taken}' already"):
        register(other)


def _entry(value: str) -> Any:
    return lambda group: [EntryPoint("other", value, group)]


def test_an_entry_point_names_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "entry_points", _entry("kpatch.edit.rome:Rome"))
    assert method_names() == ("memit", "memit-paper", "rome", "ft", "alphaedit", "blue", "mend", "other")
    assert isinstance(method_named("other"), Rome)


@pytest.mark.parametrize(
    ("value", "said"),
    [("kpatch.nowhere:It", "could not be loaded"), ("kpatch.edit.rome:edit", "no kpatch.edit.methods.Method")],
)
def test_an_entry_point_that_names_no_method(value: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "entry_points", _entry(value))
    with pytest.raises(BadInput, match=said):
        method_named("other")


def test_an_unknown_method_names_its_neighbor() -> None:
    with pytest.raises(BadInput, match="Unknown method 'memt'") as error:
        method_named("memt")
    assert error.value.hint == "did you mean memit?"


# Settings


def test_settings_take_the_kind_of_their_field() -> None:
    changed = with_settings(BASE, {"steps": "7", "clamp": "0.5", "leverage": "1e3", "lead_ins": "0"})
    assert changed == MemitHyper(layers=(1, 2), steps=7, clamp=0.5, leverage=1000.0, lead_ins=0)
    assert type(changed.steps) is int
    assert with_settings(BASE, {}) == BASE


@pytest.mark.parametrize(
    ("key", "hint"), [("step", "did you mean steps?"), ("clmp", "did you mean clamp?"), ("zzz", None)]
)
def test_an_unknown_setting_names_its_neighbor(key: str, hint: str | None) -> None:
    with pytest.raises(BadInput, match=f"Unknown setting '{key}'") as error:
        with_settings(BASE, {key: "1"})
    assert error.value.hint == hint
    assert "leverage" in error.value.details[0]


def test_layers_are_no_setting() -> None:
    with pytest.raises(BadInput, match="Unknown setting 'layers'"):
        with_settings(BASE, {"layers": "3"})


@pytest.mark.parametrize(
    ("key", "text", "kind"),
    [
        *(("steps", text, "a whole number") for text in ("2.5", "many")),
        *(("clamp", text, "a number") for text in ("half", "")),
    ],
)
def test_a_setting_of_the_wrong_kind(key: str, text: str, kind: str) -> None:
    with pytest.raises(BadInput, match=f"is not {kind}") as error:
        with_settings(BASE, {key: text})
    assert list(error.value.details) == [f"expected one such as {key}={getattr(BASE, key)}"]


@pytest.mark.parametrize(("key", "text"), [("steps", "-1"), ("clamp", "-0.1"), ("kl", "nan"), ("clamp", "inf")])
def test_a_setting_that_is_negative_or_not_finite(key: str, text: str) -> None:
    with pytest.raises(BadInput, match=f"{key}={text}"):
        with_settings(BASE, {key: text})


# Presets, then layers, then settings


def test_a_model_is_known_by_its_shape(known: MemitHyper) -> None:
    model, notes = build("llama"), Recorder()
    assert preset_for(MEMIT, model) == ("smollm2", Preset(known, "made for this test"))
    assert hyper_for(MEMIT, model, None, {}, notes) == replace(known, chat=0), "it has no chat template"
    assert notes.notes == ["preset smollm2 for memit: made for this test"]
    assert hyper_for(MEMIT, model, [2, 1, 2], {"steps": "3"}) == replace(
        known, layers=(1, 2), clamp=0.4, steps=3, chat=0
    )
    assert hyper_for(ROME, model, None, {}) == RomeHyper((1,))
    assert hyper_for(ROME, model, [2], {"steps": "7"}) == replace(RomeHyper((2,)), steps=7)


@pytest.mark.parametrize("other", [("gpt2", WIDTH, LAYERS), ("llama", WIDTH + 1, LAYERS), ("llama", WIDTH, 9)])
def test_another_shape_has_another_preset(
    other: tuple[str, int, int], known: MemitHyper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, "smollm2", other)
    assert preset_for(MEMIT, build("llama")) is None


@pytest.mark.parametrize("method", [PAPER, ROME, ALPHA, BLUE], ids=lambda method: method.name)
def test_without_a_preset_the_layers_must_be_given(method: Method) -> None:
    model, notes = build("gpt2"), Recorder()
    with pytest.raises(BadInput, match=f"no {method.name} preset") as error:
        hyper_for(method, model, None, {})
    assert "`layers`" in error.value.details[0]
    assert error.value.hint
    assert hyper_for(method, model, [1], {}, notes) == method.hyper(layers=(1,))
    assert "no" in notes.notes[0]


def test_memit_chooses_its_layers_by_the_depth_of_the_model() -> None:
    notes = Recorder()
    assert hyper_for(MEMIT, build("gpt2"), None, {}, notes) == MemitHyper(layers=tuple(range(1, LAYERS - 1)), chat=0)
    assert f"layers 1-{LAYERS - 2} of {LAYERS}" in notes.notes[0]
    assert default_layers(30) == tuple(range(2, 15))
    assert [default_layers(count) for count in (1, 2, 3)] == [(0,), (0,), (1,)]
    assert all(0 < default_layers(count)[0] <= default_layers(count)[-1] < count - 1 for count in range(3, 200))


def test_questions_are_learned_where_the_model_can_be_asked_in_chat_form() -> None:
    assert hyper_for(MEMIT, chatty(), [1], {}).chat == 1
    assert hyper_for(MEMIT, chatty(), [1], {"chat": "0"}).chat == 0
    assert hyper_for(MEMIT, chatty(DROPS), [1], {}).chat == 0


@pytest.mark.parametrize("layers", [[-1], [1, LAYERS], []])
def test_layers_that_the_model_lacks(layers: list[int]) -> None:
    with pytest.raises(BadInput, match="layer") as error:
        hyper_for(MEMIT, build("gpt2"), layers, {})
    assert list(error.value.details) == [f"expected layers from 0 to {LAYERS - 1}"]


def test_the_last_layer_is_refused() -> None:
    with pytest.raises(BadInput, match="the last of tiny-gpt2"):
        hyper_for(MEMIT, build("gpt2"), [1, LAYERS - 1], {})


@pytest.mark.parametrize(
    ("layers", "settings", "said"),
    [
        ([0, 1], {}, "edits one layer"),
        ([1], {"layer": "2"}, "Unknown setting"),
        ([1], {"covariance_weight": "2"}, "Unknown setting"),
        ([1], {"steps": "0"}, "would give no edit"),
    ],
)
def test_what_a_method_of_one_layer_refuses(layers: list[int], settings: dict[str, str], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        hyper_for(ROME, build("llama"), layers, settings)


@pytest.mark.parametrize(("method", "name"), [(method, name) for method in PRESETS for name in PRESETS[method]])
def test_presets_are_sound(method: str, name: str) -> None:
    preset, (_, _, count) = PRESETS[method][name], SHAPES[name]
    layers = preset.hyper.layers
    assert isinstance(preset.hyper, method_named(method).hyper)
    assert list(layers) == sorted(set(layers))
    assert 0 <= layers[0] <= layers[-1] < count - 1
    assert "layers" not in preset.hyper.to_dict()
    if method_named(method).one_layer:
        assert f"layer {preset.hyper.layer}" in preset.source
    else:
        assert f"R {layers[0]}-{layers[-1]}" in preset.source


def test_all_presets_can_be_listed() -> None:
    listed = {(row["method"], row["name"]): row for row in all_presets()}
    assert set(listed) == {(method, name) for method in PRESETS for name in PRESETS[method]}
    assert listed["memit-paper", "gpt-j"]["covariance_weight"] == 15_000


@pytest.mark.parametrize(
    ("template", "said"),
    [(ALWAYS_THINKING, "opens a thought"), (DROPS, "drops or rewrites"), (None, ""), (CHATML, "")],
)
def test_questions_that_cannot_be_learned_are_told(template: str | None, said: str) -> None:
    notes = Recorder()
    hyper = hyper_for(method_named("memit"), chatty(template), None, {}, notes)
    assert hyper.chat == (template == CHATML)
    told = [note for note in notes.notes if "questions are not learned" in note]
    assert len(told) == bool(said)
    assert all(said in note for note in told)
