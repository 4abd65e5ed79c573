"""Presets and settings: what a model gets, and what --layers and --set may not say."""

from __future__ import annotations

from functools import cache

import pytest

from kpatch.edit import hyper as module
from kpatch.edit.hyper import PRESETS, Hyper, Preset, hyper_for, preset_for, with_settings
from kpatch.errors import BadInput
from tests.support.models import LAYERS, WIDTH, tiny
from tests.support.reports import Recorder

build = cache(tiny)
BASE = Hyper(layers=(1, 2))


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> Hyper:
    """A preset for the shape of the tiny llama."""
    hyper = Hyper(layers=(0, 2), clamp=0.4)
    monkeypatch.setitem(module.PRESETS, "tiny", Preset(("llama", WIDTH, LAYERS), hyper, "made for this test"))
    return hyper


def test_settings_take_the_kind_of_their_field() -> None:
    changed = with_settings(BASE, {"steps": "7", "clamp": "0.5", "covariance_weight": "1e3", "prefixes": "0"})
    assert changed == Hyper(layers=(1, 2), steps=7, clamp=0.5, covariance_weight=1000.0, prefixes=0)
    assert type(changed.steps) is int
    assert with_settings(BASE, {}) == BASE


@pytest.mark.parametrize(
    ("key", "hint"), [("step", "did you mean steps?"), ("clmp", "did you mean clamp?"), ("zzz", None)]
)
def test_an_unknown_setting_names_its_neighbor(key: str, hint: str | None) -> None:
    with pytest.raises(BadInput, match=f"Unknown setting '{key}'") as error:
        with_settings(BASE, {key: "1"})
    assert error.value.hint == hint
    assert "covariance_weight" in error.value.details[0]


def test_layers_are_no_setting() -> None:
    with pytest.raises(BadInput, match="Unknown setting 'layers'"):
        with_settings(BASE, {"layers": "3"})


@pytest.mark.parametrize(
    ("key", "text", "kind"),
    [("steps", "2.5", "int"), ("steps", "many", "int"), ("clamp", "half", "float"), ("kl", "", "float")],
)
def test_a_setting_of_the_wrong_kind(key: str, text: str, kind: str) -> None:
    with pytest.raises(BadInput, match="is not a number") as error:
        with_settings(BASE, {key: text})
    assert list(error.value.details) == [f"expected {kind}"]


@pytest.mark.parametrize(("key", "text"), [("steps", "-1"), ("clamp", "-0.1"), ("kl", "nan"), ("clamp", "inf")])
def test_a_setting_that_is_negative_or_not_finite(key: str, text: str) -> None:
    with pytest.raises(BadInput, match=f"--set {key}={text}"):
        with_settings(BASE, {key: text})


def test_a_model_is_known_by_its_shape(preset: Hyper) -> None:
    model = build("llama")
    assert preset_for(model) == ("tiny", Preset(("llama", WIDTH, LAYERS), preset, "made for this test"))
    told = Recorder()
    assert hyper_for(model, None, {}, told) == preset
    assert told.notes == ["preset tiny: made for this test"]
    assert hyper_for(model, [2, 1, 2], {"steps": "3"}) == Hyper(layers=(1, 2), clamp=0.4, steps=3)


@pytest.mark.parametrize("other", [("gpt2", WIDTH, LAYERS), ("llama", WIDTH + 1, LAYERS), ("llama", WIDTH, 9)])
def test_another_shape_has_another_preset(other: tuple[str, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.PRESETS, "tiny", Preset(other, BASE, "of another model"))
    with pytest.raises(BadInput, match="no preset for tiny-llama"):
        preset_for(build("llama"))


def test_without_a_preset_the_layers_must_be_given() -> None:
    model = build("gpt2")
    with pytest.raises(BadInput, match="no preset") as error:
        hyper_for(model, None, {})
    assert "--layers" in error.value.details[0]
    assert "--layers" in str(error.value.hint)
    told = Recorder()
    assert hyper_for(model, [1], {}, told) == Hyper(layers=(1,))
    assert "no preset" in told.notes[0]


@pytest.mark.parametrize("layers", [[-1], [1, LAYERS], []])
def test_layers_that_the_model_lacks(layers: list[int]) -> None:
    with pytest.raises(BadInput, match="layer") as error:
        hyper_for(build("gpt2"), layers, {})
    assert list(error.value.details) == [f"expected layers from 0 to {LAYERS - 1}"]


def test_the_last_layer_is_refused() -> None:
    with pytest.raises(BadInput, match="the last of tiny-gpt2"):
        hyper_for(build("gpt2"), [1, LAYERS - 1], {})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_sound(name: str) -> None:
    preset = PRESETS[name]
    assert preset.source
    assert list(preset.hyper.layers) == sorted(set(preset.hyper.layers))
    assert 0 <= preset.hyper.layers[0] <= preset.hyper.layers[-1] < preset.shape[2] - 1
