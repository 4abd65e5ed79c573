from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from kpatch.patch.canonical_json import canonical, loads
from kpatch.patch.manifest import (
    BaseWeight,
    Manifest,
    ManifestError,
    NewerFormat,
    layer_in,
    matrix_shape,
    stored_transposed,
)

SHA = "ab" * 32
PART = {"id": SHA, "scale": 0.5, "facts": 1, "method": "memit", "hyperparameters": {}, "layers": [1]}


def example() -> dict[str, Any]:
    return {
        "format": 1,
        "tool": "kpatch 0.1.0",
        "base": {
            "name": "tiny",
            "revision": None,
            "family": "llama",
            "tokenizer": None,
            "weights": {"w": {"shape": [2, 3], "dtype": "F32", "sha256": SHA, "sketch": [1, 0.5]}},
        },
        "method": "memit",
        "hyperparameters": {"lambda": 300, "lr": 0.5},
        "layers": [1, 2],
        "covariance": {"id": "x", "corpus": "self", "tokens": 10},
        "facts": [{"subject": "S", "prompt": "{} is", "target": "T", "neighbors": [{"prompt": "p"}]}],
        "parents": [SHA],
        "effect": {"before": {"efficacy": None}, "after": {}, "facts": [{"id": "a", "p": 1e-05}]},
        "deltas": {"w": {"form": "lowrank", "rank": 1, "norm": 1, "relative_norm": 0.1}},
        "tensors": {"w.left": {"dtype": "F32", "shape": [2, 1], "sha256": SHA}},
    }


def written(value: dict[str, Any]) -> tuple[str, str]:
    """The text a patch file holds, made here from the rule in the format page."""
    identity = hashlib.sha256(canonical(value).encode()).hexdigest()
    return canonical({**value, "id": identity}), identity


def test_round_trip_keeps_every_key_and_number() -> None:
    text, identity = written(example())
    manifest, found = Manifest.from_json(text)
    assert manifest.to_json() == (text, identity)
    assert found == identity
    assert (manifest.layers, manifest.base.weights["w"].shape, manifest.deltas["w"].rank) == ((1, 2), (2, 3), 1)


def test_a_stack_names_the_patches_it_holds() -> None:
    assert Manifest.from_dict(example()).holds("cd" * 32) == {"cd" * 32}
    value = {**example(), "stack": [PART, {**PART, "id": "00" * 32, "scale": 1, "covariance": None}]}
    manifest, _ = Manifest.from_json(written(value)[0])
    assert manifest.holds("cd" * 32) == {SHA, "00" * 32}
    assert manifest.to_json() == written(value)


def test_a_weight_of_any_number_of_dimensions_is_a_matrix() -> None:
    assert [matrix_shape(shape) for shape in ((5,), (2, 3), (2, 3, 4))] == [(1, 5), (2, 3), (6, 4)]
    value = example()
    value["base"]["weights"]["w"]["shape"] = [6]
    assert Manifest.from_dict(value).base.weights["w"].shape == (6,)


def test_unknown_keys_are_kept_at_every_level() -> None:
    value = example()
    value["later"] = {"a": [1]}
    value["base"]["later"] = 1
    for part in (value["base"]["weights"]["w"], value["deltas"]["w"], value["tensors"]["w.left"], value["facts"][0]):
        part["later"] = "x"
    value["covariance"]["later"] = None
    manifest, identity = Manifest.from_json(written(value)[0])
    assert loads(manifest.to_json()[0]) == {**value, "id": identity}
    assert manifest.extra == {"later": {"a": [1]}}


def test_how_a_weight_is_stored_is_read_and_written_back() -> None:
    for said in (True, False):
        value = example()
        value["base"]["weights"]["w"]["transposed"] = said
        manifest, _ = Manifest.from_json(written(value)[0])
        assert manifest.base.weights["w"].transposed is said
        assert manifest.to_json() == written(value)
    assert Manifest.from_dict(example()).base.weights["w"].transposed is None


@pytest.mark.parametrize(
    ("family", "name", "shape", "said", "expected"),
    [
        ("gpt2", "h.3.mlp.c_proj.weight", (4, 3), None, True),  # patches from before the manifest said it
        ("gpt2", "transformer.h.3.mlp.c_proj.weight", (4, 3), False, False),
        ("gpt2", "lm_head.weight", (4, 3), None, False),
        ("gpt2", "h.3.ln_1.weight", (4,), None, False),
        ("llama", "model.layers.3.mlp.down_proj.weight", (3, 4), None, False),
        ("llama", "model.layers.3.mlp.down_proj.weight", (3, 4), True, True),
    ],
)
def test_which_weights_are_stored_transposed(
    family: str, name: str, shape: tuple[int, ...], said: bool | None, expected: bool
) -> None:
    assert stored_transposed(family, name, BaseWeight(shape, "F32", SHA, transposed=said)) is expected


def test_the_layer_of_a_weight_is_the_first_number_of_its_name_that_is_a_layer() -> None:
    manifest = Manifest.from_dict(example())
    assert manifest.layers == (1, 2)
    assert manifest.layer_of("tower.0.layers.2.experts.1.down.weight") == 2
    assert [manifest.layer_of(name) for name in ("h.7.down.weight", "lm_head.weight")] == [None, None]
    assert layer_in("h.7.down.weight") == 7


def test_a_later_format_is_not_guessed_at() -> None:
    with pytest.raises(NewerFormat, match="format 3"):
        Manifest.from_json(canonical({**example(), "format": 3, "base": "all different"}))


def test_only_canonical_text_is_read() -> None:
    text, _ = written(example())
    for other in (text.replace(":", ": ", 1), text.replace("0.5", "0.50"), text.replace("1e-05", "1e-5")):
        with pytest.raises(ManifestError, match="canonical"):
            Manifest.from_json(other)


def test_not_a_character_can_change_unnoticed() -> None:
    text, identity = written(example())
    for other in (text.replace('"T"', '"U"'), text.replace(identity, SHA), text.replace(f'"id":"{identity}",', "")):
        assert other != text
        with pytest.raises(ManifestError, match=r"manifest\.id"):
            Manifest.from_json(other)


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(value: Any) -> None:
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to

    return change


CHANGES = {
    "manifest.format": [_set("format", to=value) for value in (0, True, "1", None, 1.0)],
    "manifest.tool": [_set("tool", to="")],
    "manifest.base.name": [_set("base", "name", to=value) for value in ("/home/me/model", "C:\\model", 3)],
    "manifest.base.revision": [_set("base", "revision", to=4)],
    "manifest.base.weights": [_set("base", "weights", to={"../x": {}}), _set("base", "weights", to=[])],
    "manifest.layers": [_set("layers", to=value) for value in ([2, 1], [1, 1], [-1], [True], ["1"], "1")],
    "manifest.parents": [_set("parents", to=value) for value in (["ab"], [SHA, SHA], [SHA.upper()], "")],
    "manifest.facts": [_set("facts", to={}), _set("facts", 0, to="x"), _set("facts", 0, "subject", to="")],
    "manifest.covariance": [_set("covariance", to=1), _set("covariance", "tokens", to=-1)],
    "manifest.effect": [_set("effect", to=[])],
    "manifest.hyperparameters": [_set("hyperparameters", to=None)],
    "dtype": [_set("tensors", "w.left", "dtype", to="I8"), _set("base", "weights", "w", "dtype", to="bf16")],
    "shape": [_set("tensors", "w.left", "shape", to=value) for value in ([2], [0, 1], [1, 2, 3], [1.5, 2], [True, 1])],
    "base.*shape": [
        _set("base", "weights", "w", "shape", to=value) for value in ([], [0], [2, -1, 3], [1] * 9, [True], 6)
    ],
    "manifest.stack": [
        _set("stack", to=value)
        for value in ({}, [{}], [{**PART, "id": "x"}], [{**PART, "scale": 0}], [{**PART, "scale": -1}], [PART, PART])
    ],
    "sha256": [_set("tensors", "w.left", "sha256", to=value) for value in ("", SHA[:-1], SHA.upper(), None)],
    "sketch": [_set("base", "weights", "w", "sketch", to=["1"])],
    "transposed": [_set("base", "weights", "w", "transposed", to=value) for value in (None, 1, "true")],
    "form": [_set("deltas", "w", "form", to="sparse")],
    "rank": [_set("deltas", "w", "rank", to=value) for value in (0, -1, 1.0, "1")],
    "norm": [_set("deltas", "w", "norm", to=value) for value in (-1, "1", True)],
}


@pytest.mark.parametrize(("where", "change"), [(where, c) for where, changes in CHANGES.items() for c in changes])
def test_a_rule_broken_is_named(where: str, change: Callable[[dict[str, Any]], None]) -> None:
    value = example()
    change(value)
    with pytest.raises(ManifestError, match=where):
        Manifest.from_dict(value)


@pytest.mark.parametrize("key", sorted(example()))
def test_a_missing_key_is_named(key: str) -> None:
    value = example()
    del value[key]
    with pytest.raises(ManifestError, match=f"{key}: is missing"):
        Manifest.from_dict(value)


def test_numbers_that_are_not_finite_cannot_enter() -> None:
    value = example()
    value["effect"]["after"]["efficacy"] = float("nan")
    with pytest.raises(ManifestError, match="not finite"):
        Manifest.from_dict(value)
    manifest = Manifest.from_dict(example())
    object.__setattr__(manifest, "hyperparameters", {"lr": float("inf")})
    with pytest.raises(ManifestError, match="not finite"):
        manifest.to_json()
