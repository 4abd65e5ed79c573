"""`make` with ROME and fine-tuning on a tiny checkpoint directory: what their patches carry.

That they apply, revert and repeat is the contract of every method (tests/contract/test_methods.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kpatch.checkpoint.apply import apply
from kpatch.checkpoint.fit import verify_fit
from kpatch.edit.make import MakeResult, make
from kpatch.facts.fact import Fact
from kpatch.models.address import resolve
from kpatch.models.model import load_model
from kpatch.patch.check import verify
from kpatch.patch.format import read_patch
from tests.support.models import MLP_WIDTH, WIDTH, tiny

pytestmark = pytest.mark.usefixtures("shared_statistics")

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
    "ft": {"layers": [2], "settings": {"steps": "4", "learning_rate": "0.01", "batch": "1"}},
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


def test_made_on_top_of_another(world: World, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world.directory, tmp_path / "model"))
    apply([world.patches["rome"]], folder)
    out = tmp_path / "more.patch"
    make([Fact("Chicago", "The city {} is in", "Paris", id="c")], out=out, on=folder, method="ft", **QUICK["ft"])
    assert read_patch(out).manifest.parents == (world.results["rome"].patch_id,)
