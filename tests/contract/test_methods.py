"""One behaviour contract for every registered method: make, show, apply, revert, stack.

`OneStep` below is a method of another package. It is registered here and nowhere else, so that everything a method
gets from kpatch is seen to work for one that kpatch does not know.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import kpatch
from kpatch.edit import methods
from kpatch.edit.make import MakeResult, make
from kpatch.edit.methods import Edit, Inputs, Method, method_named, method_names, register
from kpatch.edit.preset_file import PresetFile
from kpatch.edit.presets import HyperParams
from kpatch.errors import BadInput
from kpatch.facts.fact import Fact
from kpatch.models.model import Model, open_model
from kpatch.patch.check import verify
from kpatch.patch.delta import Dense
from kpatch.patch.format import Patch, read_patch
from tests.support import cli
from tests.support.checkpoints import snapshot
from tests.support.editors import save_editor
from tests.support.models import LAYERS, tiny

pytestmark = pytest.mark.usefixtures("shared_statistics")


@dataclass(frozen=True, slots=True)
class OneStepHyper(HyperParams):
    """size  ‖Δ‖ / ‖W‖"""

    size: float = 0.2
    positive: ClassVar[tuple[str, ...]] = ("size",)


class OneStep(Method):
    """One step down the gradient of −log P[target] with respect to W^l."""

    name = "one-step"
    hyper = OneStepHyper
    one_layer = True

    def edit(self, model: Model, facts: Sequence[Fact], hyper: OneStepHyper, inputs: Inputs) -> Edit:
        weight = model.weight(hyper.layer)
        weight.requires_grad_()
        try:
            loss = torch.zeros(())
            for fact in facts:
                asked = model.tokenizer(fact.text()).input_ids
                answer = model.tokenizer(f" {fact.target}").input_ids
                logits = model.net(input_ids=torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1]
                loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
            (gradient,) = torch.autograd.grad(loss, [weight])
        finally:
            weight.requires_grad_(False)
        step = -hyper.size * float(weight.norm() / gradient.norm())
        return Edit({model.weight_name(hyper.layer): Dense(gradient * step)}, hyper.layers)


SLOW = [pytest.mark.slow]
METHODS = (*method_names(), OneStep.name)
FAMILIES = ("llama", "gpt2")  # stored [out, in], and [in, out]
FACTS = [
    Fact("Mona Lisa", "In the {}", "Paris", was="Rome", id="mona"),
    Fact("Moonlight Sonata", "By the {}", "Rome", id="moon"),
]
# Quick, and strong enough for a random model to learn something; a method takes those that it has
SETTINGS = {
    **{"steps": "8", "learning_rate": "0.1", "prefixes": "1", "prefix_tokens": "3", "short": "2", "long": "3"},
    **{"covariance_weight": "0.01", "leverage": "5000", "size": "0.3", "threshold": "0.3", "l2": "0.001"},
    **{"refine": "4", "refine_from": "1"},
}
TOKENS = 400


@dataclass(frozen=True)
class World:
    """A patch of one method for a tiny model of one family, and the model as it was before and after `make`."""

    method: Method
    directory: Path
    path: Path
    patch: Patch
    result: MakeResult
    layers: list[int]
    settings: dict[str, str]
    model: Model
    untouched: dict[str, Tensor]
    editor: Path | None = None

    def make(self, out: Path, **arguments: Any) -> MakeResult:
        """The method's patch in the file `out`, with its editor where it needs one."""
        return make(FACTS, out=out, model=self.model, editor=self.editor, **arguments)


@pytest.fixture(scope="module", autouse=True)
def outside() -> Iterator[None]:
    """`OneStep` is registered while this file runs."""
    register(OneStep)
    yield
    del methods._registered[OneStep.name]


# How W is stored concerns all methods alike, so that a plain `pytest` takes the cheapest to the second family
EVERY = [
    pytest.param(
        (name, family), id=f"{name}-{family}", marks=[] if family == "llama" or name == OneStep.name else SLOW
    )
    for name in METHODS
    for family in FAMILIES
]


@pytest.fixture(scope="module", params=EVERY)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, outside: None) -> Iterator[World]:
    name, family = request.param
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("method")
    made = tiny(family)
    made.net.save_pretrained(folder / "tiny-model")
    made.tokenizer.save_pretrained(folder / "tiny-model")
    method = method_named(name)
    known = {each.name for each in fields(method.hyper)}
    settings = {key: value for key, value in SETTINGS.items() if key in known}
    layers = [1] if method.one_layer else [1, 2]
    model = open_model(str(folder / "tiny-model"), device="cpu")
    untouched = copy.deepcopy(model.net.state_dict())
    path, editor = folder / "news.patch", None
    with pytest.MonkeyPatch.context() as context:
        context.setenv("KPATCH_CACHE", str(folder / "cache"))
        if method.takes_editor:
            editor = save_editor(folder / "editor.safetensors", model, layers)
            method = method.with_editor(editor)
        result = make(FACTS, out=path, model=model, method=name, editor=editor, layers=layers, tokens=TOKENS,
                      settings=settings)  # fmt: skip
        patch = read_patch(path)
        yield World(method, folder / "tiny-model", path, patch, result, layers, settings, model, untouched, editor)


def weights(net: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def loaded(directory: Path) -> dict[str, Tensor]:
    return weights(AutoModelForCausalLM.from_pretrained(directory))


@torch.no_grad()
def probability(directory: Path, world: World, fact: Fact) -> float:
    """P[target] by transformers alone; the facts' targets are single tokens."""
    (answer,) = world.model.tokenizer(f" {fact.target}").input_ids
    ids = torch.tensor([world.model.tokenizer(fact.text()).input_ids])
    return float(AutoModelForCausalLM.from_pretrained(directory)(input_ids=ids).logits[0, -1].softmax(-1)[answer])


# Make


def test_the_model_in_memory_is_left_as_it_was(world: World) -> None:
    assert same(weights(world.model.net), world.untouched)
    assert not any(weight.requires_grad for weight in world.model.net.parameters())
    for module in world.model.net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_the_patch_is_sound_and_changes_the_layers_it_names(world: World) -> None:
    assert verify(world.path).id == world.result.patch_id
    manifest = world.patch.manifest
    assert manifest.method == world.result.method == world.method.name
    assert list(manifest.layers) == list(world.result.layers) == world.layers
    assert set(world.patch.deltas) == set(world.method.weights(world.model, world.layers))
    assert {world.model.weight_name(layer) for layer in world.layers} <= set(world.patch.deltas)
    for name, delta in world.patch.deltas.items():
        assert delta.shape == tuple(world.untouched[name].shape)
        assert float(delta.dense().norm()) > 0
    assert [Fact.from_dict(fact) for fact in manifest.facts] == FACTS
    said = True if world.model.stores_transposed else None  # written only where it is true
    assert {weight.transposed for weight in manifest.base.weights.values()} == {said}


def test_values_and_keys_belong_to_facts(world: World) -> None:
    """A method keeps both or neither. Row i of the values is of group i, or where there are no groups of fact i."""
    patch, groups = world.patch, world.patch.manifest.groups
    assert (patch.values is None) == (not patch.keys)
    if patch.values is not None:
        assert tuple(patch.values.shape) == (len(groups or FACTS), world.model.width)
    for layer, keys in patch.keys.items():
        rows = [group for group in groups if layer in group["layers"]] if groups else FACTS
        assert tuple(keys.shape) == (len(rows), world.model.mlp_width)
    if groups:
        assert {fact for group in groups for fact in group["facts"]} == set(range(len(FACTS)))


def test_the_manifest_holds_every_hyperparameter_as_it_was_used(world: World) -> None:
    used = world.method.hyper(layers=tuple(world.layers))
    want = {each.name: getattr(used, each.name) for each in fields(used) if each.name != "layers"}
    want |= {key: type(want[key])(value) for key, value in world.settings.items()}
    if "chat" in want:
        want["chat"] = 0  # these tokenizers have no chat template
    found = dict(world.patch.manifest.hyperparameters)
    assert (found.pop("seed"), found.pop("dtype")) == (0, "float32")
    if world.editor is not None:
        assert found.pop("editor") == hashlib.sha256(world.editor.read_bytes()).hexdigest()
    assert found == want
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in want.items()}


@pytest.mark.usefixtures("own_statistics")
def test_the_command_line_makes_the_same_bytes(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache of its own nothing is shared but the inputs."""
    monkeypatch.setenv("KPATCH_CACHE", str(tmp_path / "cache"))
    facts = tmp_path / "facts.yaml"
    facts.write_text(json.dumps({"facts": [fact.in_manifest() for fact in FACTS]}), encoding="utf-8")
    ran = cli.run(
        *("make", facts, "--model", world.directory, "-o", tmp_path / "again.patch"),
        *("--method", world.method.name, "--layers", ",".join(map(str, world.layers)), "--tokens", TOKENS),
        *(("--editor", world.editor) if world.editor else ()),
        *(word for key, value in world.settings.items() for word in ("--set", f"{key}={value}")),
    )
    assert ran.code == 0, ran.err
    assert (tmp_path / "again.patch").read_bytes() == world.path.read_bytes()


def test_a_preset_file_makes_the_same_bytes_as_layers_and_settings(world: World, tmp_path: Path) -> None:
    told = PresetFile(world.method.name, layers=tuple(world.layers), settings=world.settings)
    preset = tmp_path / "preset.yaml"
    preset.write_text(told.text(), encoding="utf-8")
    world.make(tmp_path / "again.patch", preset=preset, tokens=TOKENS)
    assert (tmp_path / "again.patch").read_bytes() == world.path.read_bytes()


# What it refuses


@pytest.mark.parametrize(
    ("settings", "layers", "said"),
    [
        ({"stepz": "3"}, [1], "Unknown setting 'stepz'"),
        ({"layers": "3"}, [1], "Unknown setting 'layers'"),
        ({}, [LAYERS - 1], "is the last of"),
        ({}, [LAYERS], f"has no layer {LAYERS}"),
        ({}, None, "There is no .* preset"),
    ],
)
def test_wrong_settings_and_layers_are_refused(
    world: World, tmp_path: Path, settings: dict[str, str], layers: list[int] | None, said: str
) -> None:
    name = world.method.name
    if layers is None and name in ("memit", "ft", "mend"):
        pytest.skip("it chooses its layers")
    if world.method.writes_last and said == "is the last of":
        pytest.skip("it edits the last layer")
    if world.editor is not None and layers == [1]:
        layers = world.layers  # those of its editor
    with pytest.raises(BadInput, match=said):
        world.make(tmp_path / "a.patch", method=name, layers=layers, settings=settings)
    assert list(tmp_path.iterdir()) == []


def test_settings_that_would_give_no_edit_are_refused(world: World, tmp_path: Path) -> None:
    name = world.method.name
    positive = [
        key for key in world.method.hyper.positive if key in {each.name for each in fields(world.method.hyper)}
    ]
    assert positive
    for key in positive:
        with pytest.raises(BadInput, match="would give no edit"):
            world.make(tmp_path / "a.patch", method=name, layers=[1], settings={key: "0"})


def test_a_method_of_one_layer_takes_one(world: World, tmp_path: Path) -> None:
    if not world.method.one_layer:
        pytest.skip("it edits several")
    with pytest.raises(BadInput, match="edits one layer"):
        make(FACTS, out=tmp_path / "a.patch", model=world.model, method=world.method.name, layers=[1, 2])


# Show, apply, revert, stack


def test_show_needs_no_torch(world: World, light: cli.Light) -> None:
    done = light.run("show", world.path, "--json")
    assert done.code == 0, done.err
    shown = json.dumps(done.json)
    assert world.method.name in shown
    assert all(fact.target in shown for fact in FACTS)


def test_apply_changes_what_was_measured_and_revert_takes_it_back(world: World, tmp_path: Path) -> None:
    directory = tmp_path / "tiny-model"
    shutil.copytree(world.directory, directory)
    before = snapshot(directory)
    for row, fact in zip(world.result.facts, FACTS, strict=True):
        assert row["before"]["probability"] == pytest.approx(probability(directory, world, fact), rel=1e-3)
        assert row["after"]["probability"] > 1.2 * row["before"]["probability"]
    with kpatch.patched(world.model, world.path):
        in_memory = weights(world.model.net)
    kpatch.apply([world.path], directory)
    applied = loaded(directory)
    assert same(applied, in_memory)
    for name, delta in world.patch.deltas.items():
        want = (world.untouched[name].double() + delta.dense()).float()
        assert torch.equal(applied[name], want)
    for row, fact in zip(world.result.facts, FACTS, strict=True):
        assert row["after"]["probability"] == pytest.approx(probability(directory, world, fact), rel=1e-3)
    kpatch.revert(directory)
    assert snapshot(directory) == before


def test_it_stacks_with_a_patch_of_another_method(world: World, tmp_path: Path) -> None:
    """The stack does what both do, whichever goes first, and either one can be taken back alone."""
    other = tmp_path / "other.patch"
    make([Fact("Brazil", "The city of {}", "Beethoven")], out=other, model=world.model, method="ft", layers=[1],
         settings={"steps": "2", "learning_rate": "0.05"})  # fmt: skip
    kpatch.stack([world.path, other], tmp_path / "both.patch")
    found = {}
    for name, patches in {
        "stack": [tmp_path / "both.patch"],
        "both": [world.path, other],
        "turned": [other, world.path],
        "alone": [world.path],
    }.items():
        shutil.copytree(world.directory, tmp_path / name)
        kpatch.apply(patches, tmp_path / name)
        found[name] = loaded(tmp_path / name)
    assert same(found["both"], found["turned"])
    assert not same(found["both"], found["alone"])
    for name, tensor in found["both"].items():
        torch.testing.assert_close(found["stack"][name], tensor, rtol=1e-5, atol=1e-6)
    kpatch.revert(tmp_path / "both", [read_patch(other).id])
    assert same(loaded(tmp_path / "both"), found["alone"])
