"""make --method rome and ft on a tiny checkpoint directory: ordinary patches, and settings of their own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kpatch.checkpoint.apply import apply
from kpatch.checkpoint.fit import verify_fit
from kpatch.checkpoint.revert import revert
from kpatch.edit import hyper as hyper_module
from kpatch.edit.hyper import Hyper, Preset
from kpatch.edit.make import METHODS, MakeResult, make
from kpatch.edit.one_layer import PRESETS, FtHyper, RomeHyper, one_layer_hyper
from kpatch.errors import BadInput
from kpatch.facts.fact import Fact
from kpatch.models.address import resolve
from kpatch.models.model import load_model
from kpatch.patch.format import read_patch, verify
from tests.support.checkpoints import snapshot
from tests.support.models import LAYERS, MLP_WIDTH, WIDTH, tiny
from tests.support.reports import Recorder

FACTS = [
    Fact("Mona Lisa", "In the {}", "Paris", was="Rome", id="mona", references=("Paris is a city",)),
    Fact("Brazil", "The capital of {} is", "Rome", id="brazil", paraphrases=("Past {} in",)),
]
QUICK: dict[str, dict[str, Any]] = {
    "rome": {
        "layers": [1],
        "tokens": 400,
        "settings": {"steps": "4", "prefixes": "2", "short": "2", "long": "3", "learning_rate": "0.2"},
    },
    "ft": {"layers": [2], "settings": {"steps": "4", "learning_rate": "0.01"}},
}


@dataclass(frozen=True)
class World:
    directory: Path
    patches: dict[str, Path]
    results: dict[str, MakeResult]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("single")
    model = tiny("llama")
    model.net.save_pretrained(folder / "model")
    model.tokenizer.save_pretrained(folder / "model")
    with pytest.MonkeyPatch.context() as context:
        context.setenv("KPATCH_CACHE", str(folder / "cache"))
        patches = {method: folder / f"{method}.patch" for method in QUICK}
        results = {
            method: make(FACTS, out=path, model=str(folder / "model"), method=method, **QUICK[method])
            for method, path in patches.items()
        }
        yield World(folder / "model", patches, results)


def test_the_methods_there_are() -> None:
    assert METHODS == ("memit", "rome", "ft")


@pytest.mark.parametrize(("method", "layer"), [("rome", 1), ("ft", 2)])
def test_an_ordinary_patch(world: World, method: str, layer: int) -> None:
    path, result = world.patches[method], world.results[method]
    patch, name = read_patch(path), tiny("llama").weight_name(layer)
    manifest = patch.manifest
    assert verify(path).id == result.patch_id == patch.id
    assert [weight.how for weight in verify_fit(path, world.directory).weights] == ["same bytes"]
    assert (manifest.method, result.method, manifest.layers, result.layers) == (method, method, (layer,), (layer,))
    assert list(patch.deltas) == [name]
    assert patch.deltas[name].shape == (WIDTH, MLP_WIDTH)
    assert [fact["id"] for fact in manifest.facts] == ["mona", "brazil"]
    assert "references" not in manifest.facts[0]
    assert manifest.hyperparameters["steps"] == 4
    assert manifest.hyperparameters["seed"] == 0
    assert set(result.seconds) >= {"covariance", "values", "update", "total"}
    effect = result.effect
    assert effect["after"]["efficacy"]["magnitude"] > effect["before"]["efficacy"]["magnitude"]
    for before, after in ((row["before"], row["after"]) for row in result.facts):
        assert after["probability"] > before["probability"]


def test_what_a_rome_patch_carries(world: World) -> None:
    patch = read_patch(world.patches["rome"])
    model = load_model(resolve(str(world.directory)), device="cpu")
    delta = patch.deltas[model.weight_name(1)]
    assert delta.rank == 2
    assert patch.manifest.covariance is not None
    assert patch.values is not None
    assert (tuple(patch.values.shape), tuple(patch.keys[1].shape)) == ((2, WIDTH), (2, MLP_WIDTH))
    # The last fact's constraint holds in the finished patch; later facts may move earlier ones
    with torch.no_grad():
        out = (model.weight(1).double() + delta.dense()) @ patch.keys[1][1].double()
    assert float((out - patch.values[1]).norm()) <= 1e-5 * float(patch.values[1].norm())


def test_what_a_tuned_patch_carries(world: World) -> None:
    patch = read_patch(world.patches["ft"])
    assert (patch.manifest.covariance, patch.values, patch.keys) == (None, None, {})


@pytest.mark.parametrize("method", QUICK)
def test_applied_and_reverted_like_any_other(world: World, method: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world.directory, tmp_path / "model"))
    before = snapshot(folder)
    apply([world.patches[method]], folder)
    assert snapshot(folder) != before
    revert(folder)
    assert snapshot(folder) == before


@pytest.mark.parametrize("method", QUICK)
def test_the_same_inputs_give_the_same_patch(
    world: World, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = tmp_path / "again.patch"
    result = make(FACTS, out=again, model=str(world.directory), method=method, **QUICK[method])
    assert result.patch_id == world.results[method].patch_id
    assert again.read_bytes() == world.patches[method].read_bytes()


def test_made_on_top_of_another(world: World, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world.directory, tmp_path / "model"))
    apply([world.patches["rome"]], folder)
    out = tmp_path / "more.patch"
    make([Fact("Chicago", "The city {} is in", "Paris", id="c")], out=out, on=folder, method="ft", **QUICK["ft"])
    assert read_patch(out).manifest.parents == (world.results["rome"].patch_id,)


# Settings


def test_every_preset_says_where_it_is_from() -> None:
    assert set(PRESETS["rome"]) == set(hyper_module.PRESETS)
    for table in PRESETS.values():
        assert {"gpt-j", "gpt2-xl", "smollm2"} <= set(table) <= set(hyper_module.PRESETS)
        for hyper, source in table.values():
            assert f"layer {hyper.layer}" in source
            assert "layer" not in hyper.to_dict()


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny llama has the preset that smollm2 has."""
    shape = ("llama", WIDTH, LAYERS)
    monkeypatch.setattr(hyper_module, "PRESETS", {"smollm2": Preset(shape, Hyper(layers=(1,)), "for this test")})


def test_preset_then_layers_then_settings(preset: None) -> None:
    model, heard = tiny("llama"), Recorder()
    expected = PRESETS["rome"]["smollm2"][0]
    assert one_layer_hyper("rome", model, None, {}, heard) == expected
    assert "preset smollm2 for rome" in heard.notes[0]
    assert one_layer_hyper("rome", model, [2], {"steps": "7"}) == replace(expected, layer=2, steps=7)  # type: ignore[call-arg]


def test_without_a_preset_the_papers_numbers_serve() -> None:
    model, heard = tiny("gpt2"), Recorder()
    assert one_layer_hyper("rome", model, [1], {}, heard) == RomeHyper(1)
    assert one_layer_hyper("ft", model, [2], {"batch": "8"}, heard) == FtHyper(2, batch=8)
    assert len(heard.notes) == 2


@pytest.mark.parametrize(
    ("layers", "settings", "said"),
    [
        (None, {}, "no preset"),
        ([], {}, "names no layer"),
        ([99], {}, "no layer 99"),
        ([LAYERS - 1], {}, "is the last"),
        ([0, 1], {}, "edits one layer"),
        ([1], {"layer": "2"}, "Unknown setting"),
        ([1], {"covariance_weight": "2"}, "Unknown setting"),
        ([1], {"steps": "0"}, "would give no edit"),
    ],
)
def test_settings_that_are_refused(layers: list[int] | None, settings: dict[str, str], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        one_layer_hyper("rome", tiny("llama"), layers, settings)


def test_a_model_with_a_preset_for_memit_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ("llama", WIDTH, LAYERS)
    monkeypatch.setattr(hyper_module, "PRESETS", {"other": Preset(shape, Hyper(layers=(1,)), "for this test")})
    with pytest.raises(BadInput, match="no rome preset"):
        one_layer_hyper("rome", tiny("llama"), None, {})
