"""Several patches as one: the sum and its form, facts and stored rows, what is refused, what is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from kpatch.checkpoint.apply import apply
from kpatch.errors import BadInput, KpatchError, Refused
from kpatch.patch.check import verify
from kpatch.patch.delta import Delta, Dense, LowRank
from kpatch.patch.fingerprint import positions
from kpatch.patch.format import pack, read_patch, write_patch
from kpatch.patch.stack import StackResult, add_up, stack
from tests.support.checkpoints import COLS, ROWS, WEIGHTS, make_checkpoint, make_patch, random
from tests.support.reports import Recorder

FLOAT32 = 2.0**-23  # relative, of a sum whose parts are rounded to float32 once


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


def fact(subject: str, target: str, prompt: str = "{} is in", **more: Any) -> dict[str, Any]:
    return {"subject": subject, "prompt": prompt, "target": target, "id": subject.lower(), **more}


def weights(model: Path) -> dict[str, Tensor]:
    return load_file(model / "model.safetensors")


def refused(action: Callable[[], object], kind: type[KpatchError], words: str) -> KpatchError:
    with pytest.raises(kind, match=words) as caught:
        action()
    return caught.value


# The sum

RANKS = st.lists(
    st.tuples(st.integers(1, 4), st.booleans(), st.sampled_from([0.25, 1.0, 3.0])), min_size=1, max_size=4
)


@settings(deadline=None)
@given(RANKS, st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_the_sum_is_exact_to_float32(parts: list[tuple[int, bool, float]], rows: int, cols: int, seed: int) -> None:
    deltas: list[Delta] = []
    for number, (rank, dense, scale) in enumerate(parts):
        low = LowRank(random(rows, rank, seed=seed + number, scale=scale), random(rank, cols, seed=seed + 50 + number))
        deltas.append(Dense(low.dense(torch.float32), rank) if dense else low)
    exact = sum((delta.dense() for delta in deltas), torch.zeros(rows, cols, dtype=torch.float64))
    found = add_up(deltas)
    stored = {name: tensor.double() for name, tensor in pack({"w": found}).items()}
    kept = stored["w.delta"] if isinstance(found, Dense) else stored["w.left"] @ stored["w.right"]
    size = sum(float(delta.dense().norm()) for delta in deltas)
    assert float((kept - exact).norm()) <= 4 * FLOAT32 * size
    assert sum(tensor.numel() for tensor in stored.values()) <= rows * cols
    if isinstance(found, LowRank):
        assert found.rank <= min(rows, cols)


def test_factors_stay_as_they_are_until_the_sum_has_a_lower_rank() -> None:
    a, b = (LowRank(random(40, 2, seed=seed), random(2, 60, seed=seed + 1)) for seed in (1, 3))
    both = add_up([a, b])
    assert isinstance(both, LowRank)
    assert torch.equal(both.left, torch.cat([a.left, b.left], dim=1))
    assert torch.equal(both.right, torch.cat([a.right, b.right]))
    within = LowRank(a.left @ random(2, 2, seed=5), a.right)
    less = add_up([a, within, b])
    assert less.rank == 4
    torch.testing.assert_close(less.dense(), a.dense() + within.dense() + b.dense(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_stack_does_what_applying_each_does(tmp_path: Path, dtype: str) -> None:
    each, one = (make_checkpoint(tmp_path / name, dtype) for name in ("each", "one"))
    paths = [tmp_path / f"{name}.patch" for name in "abc"]
    make_patch(paths[0], each, seed=1)
    make_patch(paths[1], each, seed=2, weights=WEIGHTS[:2], dense=True)
    make_patch(paths[2], each, seed=3, weights=WEIGHTS[1:])
    result = stack(paths, tmp_path / "abc.patch")
    assert result.id == verify(tmp_path / "abc.patch").id
    apply(paths, each)
    apply([tmp_path / "abc.patch"], one)
    expected, found = weights(each), weights(one)
    for name, tensor in expected.items():
        if name in WEIGHTS:
            step = torch.finfo(tensor.dtype).eps * tensor.double().abs() + 1e-7  # float32 cannot tell more
            assert ((found[name].double() - tensor.double()).abs() <= step).all()
            # one rounding step in few entries, and only in float32: elsewhere the sum's own rounding cannot be seen
            assert dtype == "F32" or torch.equal(found[name], tensor)
        else:
            assert torch.equal(found[name], tensor)


def test_each_patch_counts_by_its_scale(model: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a.patch", tmp_path / "b.patch"
    make_patch(a, model, seed=1)
    make_patch(b, model, seed=2)
    out = tmp_path / "ab.patch"
    result = stack([a, b], out, scales=[0.5, 2])
    assert result.scales == (0.5, 2.0)
    first, second, sum_ = read_patch(a), read_patch(b), read_patch(out)
    for name in WEIGHTS:
        exact = 0.5 * first.deltas[name].dense() + 2 * second.deltas[name].dense()
        torch.testing.assert_close(sum_.deltas[name].dense(), exact, rtol=0, atol=1e-6)
        info = sum_.manifest.deltas[name]
        assert info.norm == pytest.approx(float(exact.norm()), rel=1e-5)
        assert info.relative_norm == pytest.approx(info.norm / float(weights(model)[name].double().norm()), rel=1e-5)
    assert [(part["id"], part["scale"]) for part in sum_.manifest.stack] == [(first.id, 0.5), (second.id, 2.0)]
    assert sum_.manifest.method == "stack"
    assert sum_.manifest.effect is None


WRONG = [[1.0], [1.0, 2.0, 3.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]]


@pytest.mark.parametrize("scales", WRONG)
def test_scales_are_checked(model: Path, tmp_path: Path, scales: list[float]) -> None:
    paths = [tmp_path / "a.patch", tmp_path / "b.patch"]
    for seed, path in enumerate(paths, start=1):
        make_patch(path, model, seed=seed)
    refused(
        lambda: stack(paths, tmp_path / "ab.patch", scales=scales),
        BadInput,
        "one factor" if len(scales) != 2 else "above 0",
    )
    assert not (tmp_path / "ab.patch").exists()


def test_equal_inputs_give_equal_files_and_the_order_is_kept(model: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "a.patch", tmp_path / "b.patch"]
    for seed, path in enumerate(paths, start=1):
        make_patch(path, model, seed=seed)
    first, again = (stack(paths, tmp_path / f"{name}.patch") for name in ("one", "two"))
    assert first.id == again.id
    assert stack(paths).path is None
    refused(lambda: stack(paths, tmp_path / "one.patch"), Refused, "exists")
    assert stack(paths, tmp_path / "one.patch", force=True).id == first.id


# Facts and stored rows


def with_groups(path: Path, groups: Sequence[dict[str, Any]], seed: int) -> None:
    """Give a patch stored rows by groups, as `make` writes them."""
    made = read_patch(path)
    keys = {layer: random(sum(layer in g["layers"] for g in groups), COLS, seed=seed + layer) for layer in (0, 1, 2)}
    rows = random(len(groups), ROWS, seed=seed)
    write_patch(path, replace(made.manifest, groups=tuple(groups)), pack(made.deltas, rows, keys), force=True)


def test_values_and_keys_follow_their_facts(model: Path, tmp_path: Path) -> None:
    a, b, c, out = (tmp_path / f"{name}.patch" for name in ("a", "b", "c", "out"))
    make_patch(a, model, seed=1, facts=[fact("Oslo", "Peru"), fact("Bonn", "Chile")])
    with_groups(
        a, [{"facts": [1], "layers": [0]}, {"facts": [0], "layers": [1, 2]}, {"facts": [1], "layers": [1, 2]}], 5
    )
    make_patch(b, model, seed=2, facts=[fact("Lima", "Spain"), fact(" Oslo ", "Peru", id="x")])  # no groups
    make_patch(c, model, seed=3, facts=[fact("Rome", "Cuba", id="oslo")], keys=False)
    heard = Recorder()
    stack([a, b, c], out, report=heard)
    first, second, found = read_patch(a), read_patch(b), read_patch(out)
    assert [one["subject"] for one in found.manifest.facts] == ["Oslo", "Bonn", "Lima", "Rome"]
    assert [one["id"] for one in found.manifest.facts] == ["oslo", "bonn", "lima", "oslo-2"]
    assert [(group["facts"], group["layers"]) for group in found.manifest.groups] == [
        ([1], [0]), ([0], [1, 2]), ([1], [1, 2]), ([2], [0, 1, 2]), ([0], [0, 1, 2])
    ]  # fmt: skip
    assert first.values is not None
    assert second.values is not None
    assert found.values is not None
    assert torch.equal(found.values, torch.cat([first.values, second.values]))
    for layer in (0, 1, 2):
        assert torch.equal(found.keys[layer], torch.cat([first.keys[layer], second.keys[layer]]))
    assert "c (" in heard.notes[0]
    assert "cannot be solved again" in heard.notes[0]


def test_patches_without_rows_make_a_stack_without(model: Path, tmp_path: Path) -> None:
    a, b, out = (tmp_path / f"{name}.patch" for name in ("a", "b", "out"))
    make_patch(a, model, seed=1, keys=False)
    make_patch(b, model, seed=2, facts=[])
    result = stack([a, b], out)
    found = read_patch(out)
    assert found.values is None
    assert not found.keys
    assert not found.manifest.groups
    assert len(found.manifest.facts) == 1
    assert result.interference == ()


def test_a_fact_in_both_is_listed_once_and_said_to_land_twice(model: Path, tmp_path: Path) -> None:
    a, b, child = (tmp_path / f"{name}.patch" for name in ("a", "b", "child"))
    identity = make_patch(a, model, seed=1, scale=0.01, facts=[fact("Oslo", "Peru"), fact("Bonn", "Chile")])
    make_patch(b, model, seed=2, scale=0.01, facts=[fact("Oslo", "Peru")])
    make_patch(child, model, seed=3, scale=0.01, facts=[fact("Oslo", "Peru")], parents=[identity])
    heard = Recorder()
    result = stack([a, b], tmp_path / "ab.patch", report=heard)
    assert len(result.union.facts) == 2
    assert result.to_dict()["repeated"] == [
        {"fact": "Oslo is in", "target": "Peru", "patches": [info.id for info in result.patches]}
    ]
    (warning,) = heard.warnings
    assert "a (" in warning
    assert "b (" in warning
    assert "lands 2 times" in warning
    for paths, scales in (([a, b], [0.5, 0.5]), ([a, child], [1, 1])):  # a mean of both; what only adds what lacked
        heard = Recorder()
        stack(paths, scales=scales, report=heard)
        assert heard.warnings == []
    heard = Recorder()
    stack([a, child], scales=[0.5, 1], report=heard)
    assert "on top of patch" in heard.warnings[0]


# What does not go together


def test_facts_that_contradict_are_named_with_both_patches(model: Path, tmp_path: Path) -> None:
    a, b, c = (tmp_path / f"{name}.patch" for name in ("rome", "oslo", "star"))
    kind = fact("Mars", "planet", "{} is a", relation="kind")
    make_patch(a, model, seed=1, facts=[fact("Café", "Rome"), kind])
    make_patch(b, model, seed=2, facts=[fact("Cafe\u0301", "Oslo", "{}  is in")])  # the same, composed otherwise
    make_patch(c, model, seed=3, facts=[{**kind, "prompt": "{}:", "target": "star"}])
    error = refused(lambda: stack([a, b], tmp_path / "x.patch"), Refused, r"rome \(.*oslo \(.*contradict")
    assert error.details[0].startswith("Cafe\u0301  is in: 'Rome' in rome")
    assert "'star' in star" in refused(lambda: stack([a, c]), Refused, "contradict").details[0]
    assert not (tmp_path / "x.patch").exists()
    assert stack([b, c]).union.facts


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_stack_says_how_a_weight_is_stored_where_one_of_its_patches_does(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    model = make_checkpoint(tmp_path / "model")
    paths = [tmp_path / "old.patch", tmp_path / "new.patch"]
    make_patch(paths[0], model, seed=1, keys=False)
    make_patch(paths[1], model, seed=2, keys=False, transposed=True)
    made = stack([paths[index] for index in order], tmp_path / "x.patch")
    assert made.path is not None
    assert {weight.transposed for weight in read_patch(made.path).manifest.base.weights.values()} == {True}


def test_patches_for_other_models_are_refused(model: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", seed=50)
    a, b, c, d = (tmp_path / f"{name}.patch" for name in "abcd")
    make_patch(a, model, seed=1, weights=WEIGHTS[:1])
    make_patch(b, other, seed=2, weights=WEIGHTS[:1])
    assert "sha256" in refused(lambda: stack([a, b]), Refused, r"a \(.*b \(.*different models").details[0]
    make_patch(c, other, seed=3, weights=WEIGHTS[1:2])
    assert stack([a, c]).patches  # nothing shows a difference; apply compares the weights themselves
    tensors = weights(model)
    tensors[WEIGHTS[0]].view(-1)[next(i for i in range(ROWS * COLS) if i not in positions(ROWS * COLS))] += 1e-3
    (tmp_path / "nudged").mkdir()
    save_file(tensors, tmp_path / "nudged" / "model.safetensors")
    make_patch(tmp_path / "e.patch", tmp_path / "nudged", seed=3, weights=WEIGHTS[:1])  # where no sketch looks
    refused(lambda: stack([a, tmp_path / "e.patch"]), Refused, "different models")
    made = read_patch(c)
    base = replace(made.manifest.base, name="another")
    write_patch(d, replace(made.manifest, base=base), pack(made.deltas))
    error = refused(lambda: stack([a, d]), Refused, "different models")
    assert "no weight in common" in error.details[0]
    assert "another" in error.details[1]


def test_the_same_weights_in_another_dtype_go_together(model: Path, tmp_path: Path) -> None:
    short = make_checkpoint(tmp_path / "short", "BF16")
    a, b = tmp_path / "a.patch", tmp_path / "b.patch"
    make_patch(a, model, seed=1)
    make_patch(b, short, seed=2)
    heard = Recorder()
    stack([a, b], tmp_path / "ab.patch", report=heard)
    assert any("stored as BF16 not F32" in note for note in heard.notes)
    assert {weight.dtype for weight in read_patch(tmp_path / "ab.patch").manifest.base.weights.values()} == {"F32"}
    edited = load_file(short / "model.safetensors")
    edited[WEIGHTS[0]] += 1
    save_file(edited, short / "model.safetensors")
    make_patch(tmp_path / "c.patch", short, seed=3)
    refused(lambda: stack([a, tmp_path / "c.patch"]), Refused, "different models")


def test_a_patch_counts_once_also_inside_a_stack(model: Path, tmp_path: Path) -> None:
    a, b, c, ab = (tmp_path / f"{name}.patch" for name in ("a", "b", "c", "ab"))
    for seed, path in enumerate((a, b, c), start=1):
        make_patch(path, model, seed=seed)
    refused(lambda: stack([a, b, a]), Refused, "given twice")
    stack([a, b], ab, scales=[1, 0.5])
    refused(lambda: stack([ab, b]), Refused, r"ab \(.*b \(.*both hold patch")
    stack([ab, c], tmp_path / "abc.patch", scales=[0.5, 1])
    parts = read_patch(tmp_path / "abc.patch").manifest.stack
    assert [(part["id"], part["scale"]) for part in parts] == [
        (read_patch(path).id, scale) for path, scale in ((a, 0.5), (b, 0.25), (c, 1.0))
    ]
    assert parts[0]["hyperparameters"] == {"lambda": 300.0, "steps": 25}


def test_a_patch_stacks_with_the_one_it_was_made_on(model: Path, tmp_path: Path) -> None:
    parent, child, other = (tmp_path / f"{name}.patch" for name in ("parent", "child", "other"))
    identity = make_patch(parent, model, seed=1)
    make_patch(child, model, seed=2, parents=[identity])
    make_patch(other, model, seed=3)
    result = stack([child, parent], tmp_path / "both.patch")
    assert result.to_dict()["parents"] == list(read_patch(tmp_path / "both.patch").manifest.parents) == []
    apply([tmp_path / "both.patch"], model)
    heard = Recorder()
    stack([child, other], tmp_path / "part.patch", report=heard)
    assert read_patch(tmp_path / "part.patch").manifest.parents == (identity,)
    assert identity[:12] in heard.notes[0]


# Interference


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_interference_is_what_one_delta_does_to_the_others_keys(model: Path, tmp_path: Path, family: str) -> None:
    width = COLS if family == "llama" else ROWS  # gpt2 stores [in, out]
    paths = [tmp_path / "a.patch", tmp_path / "b.patch"]
    for seed, path in enumerate(paths, start=1):
        make_patch(path, model, seed=seed, dense=seed == 2, facts=[fact(f"S{seed}", "x"), fact(f"T{seed}", "y")])
        made = read_patch(path)
        base = replace(made.manifest.base, family=family)
        keys = {layer: random(2, width, seed=seed + layer) for layer in (0, 1, 2)}
        write_patch(path, replace(made.manifest, base=base), pack(made.deltas, made.values, keys), force=True)
    result = stack(paths, scales=[1, 3])
    assert len(result.interference) == 2 * 3
    patches = [read_patch(path) for path in paths]
    for one in result.interference:
        a, b = patches[one.by], patches[one.on]
        scales = result.scales
        keys = b.keys[one.layer].double().T
        deltas = [patch.deltas[one.weight].dense() for patch in (a, b)]
        if family == "gpt2":
            deltas = [delta.T for delta in deltas]
        moved, own = scales[one.by] * deltas[0] @ keys, scales[one.on] * deltas[1] @ keys
        assert one.moved == pytest.approx(float(moved.norm()), rel=1e-6)
        assert one.own == pytest.approx(float(own.norm()), rel=1e-6)
        ratios = (moved.norm(dim=0) / own.norm(dim=0)).tolist()
        assert one.worst == pytest.approx(max(ratios), rel=1e-6)
        assert one.fact == f"{'ST'[ratios.index(max(ratios))]}{one.on + 1} is in"
        assert one.ratio == pytest.approx(one.moved / one.own)


def test_deltas_that_leave_the_keys_alone_do_not_interfere(model: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "a.patch", tmp_path / "b.patch"]
    for column, path in enumerate(paths):
        make_patch(path, model, seed=column + 1)
        made = read_patch(path)
        key = torch.zeros(1, COLS)
        key[0, column] = 1
        deltas = {name: LowRank(random(ROWS, 1, seed=column), key) for name in WEIGHTS}
        info = {name: replace(one, rank=1) for name, one in made.manifest.deltas.items()}
        tensors = pack(deltas, made.values, dict.fromkeys((0, 1, 2), key))
        write_patch(path, replace(made.manifest, deltas=info), tensors, force=True)
    result: StackResult = stack(paths)
    assert {one.ratio for one in result.interference} == {0.0}
    assert result.to_dict()["interference"][0]["by"] == result.patches[0].id
