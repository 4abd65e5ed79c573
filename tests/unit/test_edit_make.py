"""`make` end to end on a tiny checkpoint directory: the file, what it does, and what it leaves alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import kpatch
from kpatch.checkpoint.fit import verify_fit
from kpatch.edit import make as make_module
from kpatch.edit import upwards
from kpatch.edit.make import MakeResult, make
from kpatch.edit.requests import group_facts
from kpatch.edit.solve import update_apart
from kpatch.errors import BadInput, Refused
from kpatch.evaluate.metrics import measure
from kpatch.facts.fact import Fact, Neighbor
from kpatch.facts.wordings import with_wordings
from kpatch.models.address import resolve
from kpatch.models.model import Model, load_model
from kpatch.patch import size
from kpatch.patch.check import verify
from kpatch.patch.format import read_patch
from tests.support.checkpoints import snapshot
from tests.support.models import MLP_WIDTH, WIDTH, tiny
from tests.support.reports import Recorder

pytestmark = pytest.mark.usefixtures("shared_statistics")

# "The" opens its text, so that both parts are there
FACTS = [
    Fact("Mona Lisa", "In the {}", "Paris", was="Rome", id="mona"),
    Fact("The", "{} is in", "Rome", id="the", paraphrases=("Past {} in",), neighbors=(Neighbor("She is in", "Rome"),)),
]
LATER = [Fact("Moonlight Sonata", "By the {}", "Brazil", id="moon")]
QUICK: dict[str, Any] = {
    "layers": [1, 2],
    "tokens": 400,
    "settings": {"steps": "4", "lead_ins": "1", "leverage": "500"},
}


@dataclass(frozen=True)
class World:
    folder: Path
    directory: Path
    patch: Path
    result: MakeResult


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One patch made for a directory; tests copy what they change."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pipeline")
    directory = folder / "tiny-model"
    model = tiny("llama")
    model.net.save_pretrained(directory)
    model.tokenizer.save_pretrained(directory)
    patch = folder / "news.patch"
    with pytest.MonkeyPatch.context() as context:
        context.setenv("KPATCH_CACHE", str(folder / "cache"))
        yield World(folder, directory, patch, make(FACTS, out=patch, model=str(directory), **QUICK))


@pytest.fixture
def shared(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The same with the cache of the first run, whose covariance need not be collected again."""
    monkeypatch.setenv("KPATCH_CACHE", str(world.folder / "cache"))
    return world


def copied(world: World, where: Path) -> Path:
    return Path(shutil.copytree(world.directory, where / "tiny-model"))


def weights(net: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@cache
def loaded(directory: Path) -> Model:
    return load_model(resolve(str(directory)), device="cpu")


# The file


def test_the_patch_is_sound_and_fits_its_base(world: World) -> None:
    assert verify(world.patch).id == world.result.patch_id == read_patch(world.patch).id
    assert world.result.bytes == world.patch.stat().st_size
    assert [weight.how for weight in verify_fit(world.patch, world.directory).weights] == ["same bytes"] * 3


def test_the_manifest_says_what_was_done(world: World) -> None:
    patch, model = read_patch(world.patch), tiny("llama")
    manifest = patch.manifest
    names = [model.weight_name(layer) for layer in (0, 1, 2)]
    assert (manifest.base.name, manifest.base.family, manifest.method) == ("tiny-model", "llama", "memit")
    assert list(manifest.base.weights) == list(patch.deltas) == names
    learned = [replace(fact, further=()) for fact in with_wordings(FACTS, "auto")]  # it is not refined
    assert [Fact.from_dict(fact) for fact in manifest.facts] == learned
    assert manifest.facts[1]["wordings"]
    assert manifest.layers == world.result.layers == (0, 1, 2)
    assert manifest.hyperparameters["leverage"] == 500
    assert manifest.covariance is not None
    assert (manifest.covariance["corpus"], manifest.covariance["tokens"]) == ("self", 400)
    for name, delta in patch.deltas.items():
        assert delta.shape == (WIDTH, MLP_WIDTH)
        assert manifest.deltas[name].norm == pytest.approx(float(delta.dense().norm()), rel=1e-4) != 0
    # The opening fact's value first, at layer 0; then one value a fact for each of the layers asked for
    assert [dict(row) for row in manifest.groups] == [
        {"facts": [1], "layers": [0], "first": True},
        {"facts": [0], "layers": [1]},
        {"facts": [0], "layers": [2]},
        {"facts": [1], "layers": [1]},
        {"facts": [1], "layers": [2]},
    ]
    assert patch.values is not None
    assert patch.values.shape == (5, WIDTH)
    assert {layer: tuple(keys.shape) for layer, keys in patch.keys.items()} == {
        0: (1, MLP_WIDTH),
        1: (2, MLP_WIDTH),
        2: (2, MLP_WIDTH),
    }


def test_the_effect_is_measured_before_and_after(world: World) -> None:
    effect = read_patch(world.patch).manifest.effect
    assert effect == world.result.effect
    assert effect is not None
    assert set(effect) == {"before", "after", "facts"}
    assert [fact["id"] for fact in effect["facts"]] == ["mona", "the"]
    for fact in world.result.facts:
        assert fact["after"]["probability"] > 2 * fact["before"]["probability"]
    assert {"covariance", "values", "update", "total"} <= set(world.result.seconds)
    assert world.result.peak_memory_bytes is not None
    assert world.result.peak_memory_bytes > 10_000_000


@pytest.mark.usefixtures("own_statistics")
def test_the_same_inputs_give_the_same_bytes(world: World, tmp_path: Path) -> None:
    """With a cache of its own nothing is shared but the inputs; a loaded model is as good as its address."""
    other = make(FACTS, out=tmp_path / "again.patch", model=loaded(world.directory), **QUICK)
    assert other.patch_id == world.result.patch_id
    assert (tmp_path / "again.patch").read_bytes() == world.patch.read_bytes()


def test_kept_values_give_the_same_bytes_and_another_seed_another_patch(shared: World, tmp_path: Path) -> None:
    model = loaded(shared.directory)
    again = make(FACTS, out=tmp_path / "again.patch", model=model, **QUICK)
    assert again.patch_id == shared.result.patch_id
    assert make(FACTS, out=tmp_path / "seed.patch", model=model, seed=1, **QUICK).patch_id != again.patch_id


# What it does to a checkpoint


def test_apply_gives_what_was_tried_in_memory_and_revert_takes_it_back(world: World, tmp_path: Path) -> None:
    directory = copied(world, tmp_path)
    before = snapshot(directory)
    model = loaded(world.directory)
    base = weights(model.net)
    with kpatch.patched(model, world.patch):
        in_memory = weights(model.net)
    assert same(weights(model.net), base)
    assert {name for name in base if not torch.equal(base[name], in_memory[name])} == set(
        read_patch(world.patch).deltas
    )
    kpatch.apply([world.patch], directory)
    assert same(weights(AutoModelForCausalLM.from_pretrained(directory)), in_memory)
    kpatch.revert(directory)
    assert snapshot(directory) == before


def test_a_patch_on_a_patched_directory_preserves_the_earlier_keys(
    shared: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copied(shared, tmp_path)
    kpatch.apply([shared.patch], directory)
    settings = {**QUICK, "settings": {**QUICK["settings"], "leverage": "5000"}}
    on = make(LATER, out=tmp_path / "on.patch", on=directory, **settings)
    monkeypatch.setattr(make_module, "carried_by", lambda path: ((), {}))
    make(LATER, out=tmp_path / "plain.patch", on=directory, **settings)
    kept, plain = read_patch(tmp_path / "on.patch"), read_patch(tmp_path / "plain.patch")
    assert kept.manifest.parents == (shared.result.patch_id,)
    assert plain.manifest.parents == ()
    first = read_patch(shared.patch)
    assert list(kept.deltas) == list(first.deltas)[1:]  # the same base, although the directory's bytes are others now
    assert all(first.manifest.base.weights[name] == base for name, base in kept.manifest.base.weights.items())
    model = loaded(shared.directory)
    for layer in (1, 2):
        name, keys = model.weight_name(layer), first.keys[layer].T
        assert kept.deltas[name].matmul(keys).norm() < 0.2 * plain.deltas[name].matmul(keys).norm()
    # and it goes on top, where the directory says it does
    kpatch.apply([tmp_path / "on.patch"], directory)
    assert on.facts[0]["after"]["probability"] > on.facts[0]["before"]["probability"]


def test_a_patch_as_large_as_those_that_break_a_model_is_warned_of(
    shared: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = size.size_of(read_patch(shared.patch).manifest)
    for limit, warned in ((found * 0.9, 1), (found * 1.1, 0)):
        monkeypatch.setattr(size, "WARN_ABOVE", limit)
        report = Recorder()
        make(FACTS, out=tmp_path / f"{warned}.patch", model=str(shared.directory), report=report, **QUICK)
        assert sum(f"changes weights by {found:.0%}" in text for text in report.warnings) == warned


# What it refuses, and what it leaves alone


def test_no_facts_and_unknown_methods_and_no_model(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no facts"):
        make([], out=tmp_path / "a.patch", model="smollm2")
    with pytest.raises(BadInput, match="Unknown method 'magic'"):
        make(FACTS, out=tmp_path / "a.patch", model="smollm2", method="magic")
    with pytest.raises(BadInput, match="No model was named"):
        make(FACTS, out=tmp_path / "a.patch")
    with pytest.raises(BadInput, match="not loaded from a checkpoint directory"):
        make(FACTS, out=tmp_path / "a.patch", model=tiny("llama"), **QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["memit", "memit-paper", "rome", "ft", "alphaedit", "blue"])
def test_wrong_settings_are_refused_before_the_model_is_looked_for(tmp_path: Path, method: str) -> None:
    for settings in ({"steps": "sixty"}, {"step": "60"}):
        with pytest.raises(BadInput, match=r"steps=sixty is not a whole number|Unknown setting 'step'"):
            make(FACTS, out=tmp_path / "x", model=str(tmp_path / "none"), method=method, settings=settings)


def test_a_file_that_exists_is_not_written_over(shared: World, tmp_path: Path) -> None:
    out = tmp_path / "mine.patch"
    out.write_text("mine")
    model = loaded(shared.directory)
    with pytest.raises(Refused, match="exists"):
        make(FACTS, out=out, model=model, **QUICK)
    assert out.read_text() == "mine"
    make(FACTS, out=out, model=model, force=True, **QUICK)
    assert out.read_bytes() == shared.patch.read_bytes()


def test_weights_in_memory_are_as_they_were(shared: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(shared.directory)
    before = weights(model.net)
    make(FACTS, out=tmp_path / "a.patch", model=model, **QUICK)
    assert same(weights(model.net), before)

    calls: list[bool] = []

    def fail(*args: Any, **options: Any) -> Any:
        calls.append(not same(weights(model.net), before))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args, **options)

    monkeypatch.setattr(make_module, "measure", fail)
    with pytest.raises(KeyboardInterrupt):
        make(FACTS, out=tmp_path / "b.patch", model=model, **QUICK)
    assert calls == [False, True], "measured with the update in place"
    assert same(weights(model.net), before)
    assert not (tmp_path / "b.patch").exists()


def test_an_error_between_two_layers_leaves_the_weights(
    shared: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(shared.directory)
    before, calls = weights(model.net), []

    def fail(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("no more")
        return update_apart(*args)

    monkeypatch.setattr(upwards, "update_apart", fail)
    with pytest.raises(RuntimeError, match="no more"):
        make(FACTS, out=tmp_path / "b.patch", model=model, **QUICK)
    assert same(weights(model.net), before)


def test_the_facts_of_this_file_are_of_both_kinds(world: World) -> None:
    groups = group_facts(loaded(world.directory), FACTS + LATER, ("", "She said."))
    assert [(group.subject, group.first) for group in groups] == [
        ("Mona Lisa", False),
        ("The", True),
        ("The", False),
        ("Moonlight Sonata", False),
    ]


def test_by_default_facts_that_no_library_knows_are_learned_in_the_model_s_and_in_turned_words(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Fact] = []

    def ask(model: Model, facts: Any, *args: Any) -> tuple[Fact, ...]:
        asked.extend(facts)
        return tuple(facts)

    monkeypatch.setattr(make_module, "ask_for_wordings", ask)
    unknown = Fact("Mona Lisa", "The zorb of the {} is", "Paris")
    for mode in (None, "given"):
        made = make([unknown], out=tmp_path / f"{mode}.patch", model=str(world.directory), wordings=mode, **QUICK)
        (fact,) = read_patch(made.path).manifest.facts
        assert [one.subject for one in asked] == ["Mona Lisa"]
        assert fact.get("wordings", [])[:1] == (["The {}'s zorb is"] if mode is None else [])
        assert fact.get("question") == ("What is the zorb of the {}?" if mode is None else None)
