"""Two checkpoints as a patch: which tensors, in which form, and that applying it gives the second one's bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from kpatch.checkpoint.apply import apply
from kpatch.checkpoint.diff.checkpoints import CheckpointDiff, diff_checkpoints
from kpatch.checkpoint.fit import verify_fit
from kpatch.checkpoint.revert import revert
from kpatch.errors import BadInput, CheckFailed, Damaged, KpatchError, Refused
from kpatch.patch.check import verify
from kpatch.patch.format import read_patch
from tests.support.checkpoints import DTYPES, WEIGHTS, make_checkpoint, make_patch, random, save_tensors, snapshot
from tests.support.reports import Recorder

NORM = "model.layers.0.input_layernorm.weight"
EMBED = "model.embed_tokens.weight"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "old")


def weights(model: Path) -> dict[str, Tensor]:
    return {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}


def edited(old: Path, change: Callable[[dict[str, Tensor]], object], name: str = "new", sharded: bool = False) -> Path:
    """A copy of a checkpoint with other weights."""
    new = old.parent / name
    new.mkdir()
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(old / file, new)
    tensors = weights(old)
    change(tensors)
    save_tensors(new, {name: tensor.contiguous() for name, tensor in tensors.items()}, sharded)
    return new


def large(old: Path, rows: int = 60, cols: int = 80, dtype: str = "F32") -> Path:
    """The checkpoint with a matrix in which low rank pays."""
    tensors = weights(old)
    tensors["big"] = random(rows, cols, seed=40, scale=0.1).to(DTYPES[dtype])
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    return old


def gives(old: Path, new: Path, out: Path, **options: Any) -> CheckpointDiff:
    """Make the patch, and check all that holds of any: it is sound, fits, applies as it says, and comes off again."""
    found = diff_checkpoints(old, new, out, **options)
    assert verify(out).id == found.id
    assert verify_fit(out, old).ok
    before = snapshot(old)
    expected = weights(new)
    apply([out], old)
    got = weights(old)
    named = {tensor.name: tensor for tensor in found.tensors}
    for name, tensor in got.items():
        if name in named:
            off = int((tensor.double() != expected[name].to(tensor.dtype).double()).sum())
            assert off == named[name].differs, name
        elif expected[name].dtype == tensor.dtype:
            assert torch.equal(tensor, expected[name]), name
    revert(old)
    assert snapshot(old) == before
    return found


# Exact


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_any_change_comes_out_bit_for_bit(tmp_path: Path, dtype: str, sharded: bool) -> None:
    old = make_checkpoint(tmp_path / "old", dtype)

    def change(tensors: dict[str, Tensor]) -> None:
        for number, name in enumerate((WEIGHTS[0], NORM, EMBED)):
            tensors[name] = (tensors[name].float() + random(*tensors[name].shape, seed=number)).to(DTYPES[dtype])

    new = edited(old, change, sharded=sharded)
    found = gives(old, new, tmp_path / "x.patch")
    assert [tensor.name for tensor in found.tensors] == sorted((WEIGHTS[0], NORM, EMBED))
    assert found.same == 4
    assert all(tensor.differs == 0 for tensor in found.tensors)
    made = read_patch(tmp_path / "x.patch").manifest
    assert (made.method, made.facts, made.layers, made.base.family) == ("diff", (), (0,), "llama")
    assert made.base.name == "old"
    assert made.base.weights[NORM].shape == (8,)


@settings(max_examples=settings.default.max_examples // 4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dtype=st.sampled_from(["F32", "F16", "BF16"]), scale=st.floats(-6, 3), seed=st.integers(0, 99))
def test_changes_of_any_size_come_out_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, scale: float, seed: int
) -> None:
    old = make_checkpoint(tmp_path_factory.mktemp("diff") / "old", dtype)

    def change(tensors: dict[str, Tensor]) -> None:
        for name in WEIGHTS:
            noise = 10**scale * random(*tensors[name].shape, seed=seed)
            tensors[name] = (tensors[name].float() + noise).to(DTYPES[dtype])

    new = edited(old, change)
    if diff_checkpoints(old, new).equal:
        return
    assert all(tensor.differs == 0 for tensor in gives(old, new, old.parent / "x.patch").tensors)


def test_what_float32_cannot_bridge_is_stored_in_float64(old: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[WEIGHTS[0]][0, 0] = 1.2345678e-9  # beside 0.1 or so: the difference has more digits than float32

    new = edited(old, change)
    (tensor,) = gives(old, new, tmp_path / "x.patch").tensors
    assert (tensor.form, tensor.bytes, tensor.differs) == ("dense", 8 * tensor.entries, 0)
    assert read_patch(tmp_path / "x.patch").deltas[WEIGHTS[0]].dense().dtype == torch.float64


def test_sixteen_bits_do_where_they_can(tmp_path: Path) -> None:
    old = make_checkpoint(tmp_path / "old", "BF16")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[WEIGHTS[0]] = tensors[WEIGHTS[0]] * 1.5  # the difference is half of it: as few bits

    (tensor,) = gives(old, edited(old, change), tmp_path / "x.patch").tensors
    assert (tensor.form, tensor.bytes) == ("dense", 2 * tensor.entries)


def test_a_few_changed_rows_are_all_that_is_stored(old: Path, tmp_path: Path) -> None:
    large(old)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["big"][[3, 59]] *= torch.linspace(0.6, 1.4, 80)  # sums of such are exact in float32

    (tensor,) = gives(old, edited(old, change), tmp_path / "x.patch").tensors
    assert (tensor.form, tensor.rank, tensor.differs) == ("lowrank", 2, 0)


def test_factors_are_kept_where_they_give_the_very_bytes(tmp_path: Path) -> None:
    old = large(make_checkpoint(tmp_path / "old", "BF16"), dtype="BF16")
    left, right = torch.ones(60, 1), torch.tensor([0.5, 0.25] * 40)[None]

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["big"] = ((tensors["big"] * 0).float() + left @ right).bfloat16()

    tensors = weights(old)
    tensors["big"] = torch.full((60, 80), 0.125).bfloat16()
    save_file(tensors, old / "model.safetensors")
    (tensor,) = gives(old, edited(old, change), tmp_path / "x.patch").tensors
    assert (tensor.form, tensor.rank, tensor.differs) == ("lowrank", 1, 0)


# Within a tolerance


def test_a_patched_checkpoint_gives_its_rank_back_when_asked(old: Path, tmp_path: Path) -> None:
    large(old)
    make_patch(tmp_path / "a.patch", old, weights=["big"], rank=3, keys=False)
    apply([tmp_path / "a.patch"], old, out=tmp_path / "new")
    exact = gives(old, tmp_path / "new", tmp_path / "x.patch")
    assert [(tensor.form, tensor.differs) for tensor in exact.tensors] == [("dense", 0)]
    assert exact.tensors[0].shorter is not None
    assert exact.tensors[0].shorter[0] == 3
    (tensor,) = gives(old, tmp_path / "new", tmp_path / "y.patch", tolerance=1e-6).tensors
    assert (tensor.form, tensor.rank) == ("lowrank", 3)
    assert 0 < (tensor.differs or 0) < 0.5 * tensor.entries
    assert 0 < (tensor.error or 0) <= 1e-6
    one, other = read_patch(tmp_path / "a.patch"), read_patch(tmp_path / "y.patch")
    torch.testing.assert_close(other.deltas["big"].dense(), one.deltas["big"].dense(), rtol=0, atol=1e-6)
    assert other.manifest.deltas["big"].extra["differs"] == tensor.differs
    apply([tmp_path / "y.patch"], old)
    torch.testing.assert_close(weights(old)["big"], weights(tmp_path / "new")["big"], rtol=2.0**-22, atol=1e-7)


def test_a_coarse_tolerance_and_a_bound_on_the_rank(old: Path, tmp_path: Path) -> None:
    large(old)
    u, v = (torch.linalg.qr(random(size, 10, seed=size)).Q for size in (60, 80))

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["big"] += (u * torch.logspace(0, -3, 10)) @ v.T

    new = edited(old, change)
    (tensor,) = gives(old, new, tmp_path / "x.patch", tolerance=0.1).tensors
    assert (tensor.form, tensor.rank) == ("lowrank", 4)
    assert 0.01 < (tensor.error or 0) <= 0.1
    (tensor,) = gives(old, new, tmp_path / "y.patch", tolerance=0.1, max_rank=3).tensors
    assert (tensor.form, tensor.differs) == ("dense", 0)


def test_the_same_seed_gives_the_same_patch(old: Path, tmp_path: Path) -> None:
    large(old)
    new = edited(old, lambda tensors: tensors["big"].add_(random(60, 2, seed=1) @ random(2, 80, seed=2)))
    ids = [
        diff_checkpoints(old, new, tmp_path / f"{number}.patch", tolerance=1e-5, seed=seed).id
        for number, seed in enumerate((0, 0, 1))
    ]
    assert ids[0] == ids[1] != ids[2]


def test_blocks_of_rows_make_no_difference(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large(old)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["big"][[1, 50]] += 1
        tensors[EMBED] += 1

    new = edited(old, change)
    whole = diff_checkpoints(old, new, tmp_path / "x.patch")
    monkeypatch.setattr("kpatch.patch.delta.BLOCK", 7 * 80)
    again = diff_checkpoints(old, new, tmp_path / "y.patch")
    assert [tensor.form for tensor in whole.tensors] == [tensor.form for tensor in again.tensors]
    for name, delta in read_patch(tmp_path / "x.patch").deltas.items():
        torch.testing.assert_close(read_patch(tmp_path / "y.patch").deltas[name].dense(), delta.dense())


# Other dtypes, other shapes


@pytest.mark.parametrize(("first", "second"), [("F32", "BF16"), ("BF16", "F32"), ("F16", "BF16"), ("F32", "F16")])
def test_another_dtype_alone_is_no_change(tmp_path: Path, first: str, second: str) -> None:
    old = make_checkpoint(tmp_path / "old", first)
    heard = Recorder()

    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name] = tensors[name].to(DTYPES[second])

    new = edited(old, change)
    if (first, second) == ("F16", "BF16"):
        assert not diff_checkpoints(new, old, report=heard).tensors  # BF16 holds what F16 rounds to it
    found = diff_checkpoints(old, new, report=heard)
    assert found.equal
    assert any("another dtype" in note for note in heard.notes)
    assert len(found.notes) == 1
    with pytest.raises(CheckFailed, match="same weights"):
        diff_checkpoints(old, new, tmp_path / "x.patch")


@pytest.mark.parametrize(("first", "second"), [("BF16", "F32"), ("F32", "BF16")])
def test_a_change_across_dtypes_lands_as_the_first_can_hold_it(tmp_path: Path, first: str, second: str) -> None:
    old = make_checkpoint(tmp_path / "old", first)

    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name] = tensors[name].to(DTYPES[second])
        tensors[WEIGHTS[1]] = tensors[WEIGHTS[1]] * 2 + 0.5

    found = gives(old, edited(old, change), tmp_path / "x.patch")
    assert [tensor.name for tensor in found.tensors] == [WEIGHTS[1]]
    assert found.tensors[0].dtype == first


def test_tensors_of_other_dimensions(old: Path, tmp_path: Path) -> None:
    tensors = weights(old)
    tensors |= {"experts": random(3, 4, 5, seed=1), "scalar": torch.tensor([2.5])}
    save_file(tensors, old / "model.safetensors")
    new = edited(old, lambda tensors: tensors.update(experts=tensors["experts"] * 1.5, scalar=torch.tensor([3.0])))
    found = gives(old, new, tmp_path / "x.patch")
    assert {tensor.name: tensor.shape for tensor in found.tensors} == {"experts": (3, 4, 5), "scalar": (1,)}
    assert read_patch(tmp_path / "x.patch").deltas["experts"].shape == (12, 5)


def test_zeros_that_change_their_sign_only(old: Path, tmp_path: Path) -> None:
    tensors = weights(old)
    tensors[NORM] = torch.zeros(8)
    save_file(tensors, old / "model.safetensors")
    new = edited(old, lambda tensors: tensors.update({NORM: -torch.zeros(8)}))
    found = diff_checkpoints(old, new)
    assert found.equal
    assert "sign of zeros" in found.notes[0]


# Refused


def refused(old: Path, new: Path, kind: type[KpatchError], words: str, **options: Any) -> KpatchError:
    out = old.parent / "never.patch"
    with pytest.raises(kind, match=words) as caught:
        diff_checkpoints(old, new, out, **options)
    assert not out.exists()
    return caught.value


def test_checkpoints_that_cannot_be_compared(old: Path, tmp_path: Path) -> None:
    more = edited(old, lambda tensors: tensors.update(extra=torch.ones(1)), "more")
    assert "only in" in refused(old, more, Refused, "same tensors").details[0]
    assert "extra" in refused(more, old, Refused, "same tensors").details[0]
    other = edited(old, lambda tensors: tensors.update({NORM: torch.ones(9)}), "other")
    assert "[8] and [9]" in refused(old, other, Refused, "different shapes").details[0]
    kind = edited(old, lambda tensors: tensors.update({NORM: torch.ones(8)}), "kind")
    (kind / "config.json").write_text('{"model_type": "gpt2"}')
    assert "llama and gpt2" in refused(old, kind, Refused, "different architectures").details[0]
    refused(old, tmp_path / "none", BadInput, "no checkpoint directory")
    refused(old, old, CheckFailed, "same weights")


def test_tensors_without_float_numbers(old: Path) -> None:
    tensors = weights(old)
    tensors["ids"] = torch.arange(4)
    save_file(tensors, old / "model.safetensors")
    same = edited(old, lambda tensors: tensors[EMBED].add_(1), "same")
    assert diff_checkpoints(old, same, old.parent / "x.patch").same == 7
    new = edited(old, lambda tensors: tensors["ids"].add_(1))
    assert "ids: I64" in refused(old, new, Refused, "no float numbers").details[0]
    quantized = edited(old, lambda tensors: tensors.update({NORM: torch.ones(8, dtype=torch.int8)}), "int8")
    assert "I8" in refused(old, quantized, Refused, "no float numbers").details[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(old: Path, value: float) -> None:
    new = edited(old, lambda tensors: tensors[WEIGHTS[0]].__setitem__((0, 0), value))
    refused(old, new, BadInput, "NaN or Inf")
    refused(new, old, BadInput, "NaN or Inf")


def test_numbers_beyond_the_first_dtype(tmp_path: Path) -> None:
    old = make_checkpoint(tmp_path / "old", "F16")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[NORM] = torch.full((8,), 1e5)

    refused(old, edited(old, change), BadInput, "cannot hold as F16")


def test_a_base_that_carries_patches(old: Path, tmp_path: Path) -> None:
    make_patch(tmp_path / "a.patch", old, weights=WEIGHTS[:1])
    new = edited(old, lambda tensors: (tensors[WEIGHTS[0]].add_(1), tensors[EMBED].add_(1)))
    elsewhere = edited(old, lambda tensors: tensors[EMBED].add_(1), "elsewhere")
    apply([tmp_path / "a.patch"], old)
    assert WEIGHTS[0] in refused(old, new, Refused, "carries patches").details[0]
    patched = weights(old)
    tensors = weights(elsewhere)
    tensors[WEIGHTS[0]] = patched[WEIGHTS[0]]
    save_tensors(elsewhere, tensors, sharded=False)
    # only what carries no patch differs: that can go on top
    assert diff_checkpoints(old, elsewhere, tmp_path / "x.patch").tensors[0].name == EMBED
    apply([tmp_path / "x.patch"], old)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in weights(old).items())
    (old / ".kpatch" / "stage").mkdir()
    refused(old, new, Damaged, "interrupted")


def test_options_are_checked(old: Path) -> None:
    new = edited(old, lambda tensors: tensors[EMBED].add_(1))
    for tolerance in (0.0, 1.0, -1.0, float("nan")):
        refused(old, new, BadInput, "tolerance=", tolerance=tolerance)
    refused(old, new, BadInput, "max_rank=0", max_rank=0)
    (old.parent / "there.patch").write_text("x")
    with pytest.raises(Refused, match="exists"):
        diff_checkpoints(old, new, old.parent / "there.patch")


def test_a_checkpoint_that_changes_meanwhile(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = edited(old, lambda tensors: tensors[EMBED].add_(random(16, 8, seed=1)))
    from kpatch.checkpoint.diff import checkpoints

    write = checkpoints.write_patch

    def late(path: Path, manifest: Any, tensors: Any, force: bool) -> str:
        class Changing(dict[str, Tensor]):
            def __getitem__(self, name: str) -> Tensor:
                return super().__getitem__(name) + 1  # what is written is not what was hashed

        return write(path, manifest, Changing(tensors.items()), force)

    monkeypatch.setattr(checkpoints, "write_patch", late)
    refused(old, new, Refused, "changed while")


def test_the_notes_name_other_tokenizers(old: Path) -> None:
    new = edited(old, lambda tensors: tensors[EMBED].add_(1))
    (new / "tokenizer.json").write_text(json.dumps({"other": 1}))
    assert any("tokenizers differ" in note for note in diff_checkpoints(old, new).notes)
