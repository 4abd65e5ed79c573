"""Patches tried in memory: exact sums inside, the same tensors outside, refusals before anything changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kpatch.checkpoint.apply import apply
from kpatch.errors import BadInput, Refused
from kpatch.evaluate.patched import patched
from kpatch.models.model import Model
from kpatch.patch.delta import Dense, LowRank
from kpatch.patch.format import read_patch
from kpatch.patch.stack import stack
from tests.support import checkpoints
from tests.support.checkpoints import WEIGHTS, random
from tests.support.models import tiny

torch.set_num_threads(1)


class Heard:
    """A reporter that remembers its warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def note(self, message: str) -> None:
        raise AssertionError(message)

    @contextlib.contextmanager
    def task(self, description: str, total: int | None = None, unit: str = "") -> Iterator[Callable[[int], None]]:
        yield lambda amount: None


def deltas(model: Model, seed: int = 1, count: int = 2) -> dict[str, LowRank | Dense]:
    """Changes of the first `count` layers' W, the second one dense."""
    found: dict[str, LowRank | Dense] = {}
    for layer in range(count):
        rows, cols = model.weight(layer).shape
        low = LowRank(random(rows, 2, seed=seed + layer, scale=0.3), random(2, cols, seed=seed + 50 + layer))
        found[model.weight_name(layer)] = Dense(low.dense(torch.float32)) if layer == 1 else low
    return found


def make_patch(path: Path, directory: Path, **options: Any) -> str:
    return checkpoints.make_patch(path, directory, keys=False, **options)  # its keys are of another width


def everything(model: Model) -> dict[str, tuple[int, Tensor]]:
    """Where every weight lies, and its bits."""
    return {name: (p.data_ptr(), p.detach().clone()) for name, p in model.net.named_parameters()}


def assert_untouched(model: Model, before: dict[str, tuple[int, Tensor]]) -> None:
    for name, weight in model.net.named_parameters():
        assert weight.data_ptr() == before[name][0], name
        assert torch.equal(weight, before[name][1]), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 stores W as [in, out]
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_the_rounded_float64_sum(family: str, dtype: torch.dtype) -> None:
    model = tiny(family)
    model.net.to(dtype)
    before, change = everything(model), deltas(model)
    with patched(model, change) as inside:
        assert inside is model
        for name, weight in model.net.named_parameters():
            old = before[name][1]
            expected = (old.double() + change[name].dense()).to(dtype) if name in change else old
            assert torch.equal(weight, expected), name
            assert weight.dtype == dtype
    assert_untouched(model, before)


def test_a_norm_is_patched_as_a_matrix_of_one_row() -> None:
    model = tiny("llama")
    before, name = everything(model), "model.layers.0.input_layernorm.weight"
    with patched(model, {name: LowRank(torch.ones(1, 1), random(1, 32, seed=1))}):
        assert torch.equal(model.net.get_parameter(name), before[name][1] + random(1, 32, seed=1)[0])
    assert_untouched(model, before)


def test_blocks_of_rows_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    with patched(model, deltas(model)):
        whole = model.weight(0).clone()
    monkeypatch.setattr("kpatch.patch.delta.BLOCK", 5 * model.weight(0).shape[1])
    with patched(model, deltas(model)):
        assert torch.equal(model.weight(0), whole)


def test_a_network_without_a_model_around_it() -> None:
    model = tiny("llama")
    before = everything(model)
    with patched(model.net, deltas(model)) as net:
        assert net is model.net
        assert not torch.equal(model.weight(0), before[model.weight_name(0)][1])
    assert_untouched(model, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_inside_changes_nothing(error: type[BaseException]) -> None:
    model = tiny("llama")
    before = everything(model)
    with pytest.raises(error), patched(model, deltas(model)), patched(model, deltas(model, seed=9)):
        raise error
    assert_untouched(model, before)


def test_nested_patches_add_up_and_leave_in_any_order() -> None:
    model = tiny("llama")
    model.net.to(torch.bfloat16)
    before, first, second = everything(model), deltas(model, seed=1), deltas(model, seed=9, count=3)

    def expect(*changes: dict[str, LowRank | Dense]) -> None:
        for name, (_, old) in before.items():
            total = old.double() + sum(change[name].dense() for change in changes if name in change)
            assert torch.equal(model.net.get_parameter(name), total.to(old.dtype)), name

    one, two = patched(model, first), patched(model, second)
    for leave_first, left in ((one, second), (two, first)):
        one, two = patched(model, first), patched(model, second)
        leave_first, leave_last = (one, two) if left is second else (two, one)
        one.__enter__()
        expect(first)
        two.__enter__()
        expect(first, second)
        leave_first.__exit__(None, None, None)
        expect(left)
        leave_last.__exit__(None, None, None)
        assert_untouched(model, before)


def test_what_does_not_fit_is_refused_with_everything_named() -> None:
    model = tiny("llama")
    before = everything(model)
    wrong = {
        **deltas(model),
        "model.layers.9.mlp.down_proj.weight": deltas(model)[model.weight_name(0)],
        model.weight_name(2): LowRank(random(64, 1, seed=1), random(1, 32, seed=2)),
    }
    with pytest.raises(Refused, match="does not fit") as caught, patched(model, wrong):
        pass
    assert caught.value.details == (
        "model.layers.9.mlp.down_proj.weight: the model has no such weight",
        "model.layers.2.mlp.down_proj.weight: expected shape [64, 32], found [32, 64]",
    )
    assert_untouched(model, before)


def test_a_weight_that_is_not_in_memory_is_refused() -> None:
    model = tiny("llama")
    change = deltas(model)
    model.down(0).to("meta")
    with pytest.raises(Refused) as caught, patched(model, change):
        pass
    assert "not in memory" in caught.value.details[0]


def test_numbers_out_of_range_are_refused() -> None:
    model = tiny("llama")
    model.net.to(torch.float16)
    before, change = everything(model), deltas(model)
    change[model.weight_name(1)] = Dense(torch.full(model.weight(1).shape, 1e5))
    with pytest.raises(Refused, match=r"layers\.1.*out of the range of float16"), patched(model, change):
        pass
    assert_untouched(model, before)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Model, Path]:
    """A tiny model and a checkpoint directory that holds it."""
    model = tiny("llama")
    model.net.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_patch_in_memory_is_the_patch_applied(saved: tuple[Model, Path], tmp_path: Path, dtype: str) -> None:
    model, directory = saved
    model.net.to(getattr(torch, dtype)).save_pretrained(directory)
    first, second = tmp_path / "a.patch", tmp_path / "b.patch"
    make_patch(first, directory, seed=1)
    make_patch(second, directory, seed=2, weights=WEIGHTS[:2], dense=True)
    before = everything(model)
    apply([first, second], directory)
    applied = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    for outer, inner in ((first, second), (second, first)):
        with patched(model, outer), patched(model, read_patch(inner)):
            for name, weight in applied.named_parameters():
                assert torch.equal(model.net.get_parameter(name), weight), name
            assert not torch.equal(model.net.get_parameter(WEIGHTS[2]), before[WEIGHTS[2]][1])
        assert_untouched(model, before)


def test_the_base_in_another_dtype_is_the_base(saved: tuple[Model, Path], tmp_path: Path) -> None:
    model, directory = saved
    make_patch(tmp_path / "a.patch", directory)
    model.net.to(torch.bfloat16)
    with patched(model, str(tmp_path / "a.patch")):
        pass
    model.weight(2).data.mul_(1.1)
    with pytest.raises(Refused, match="not the base it was made for, tiny/model") as caught:
        patched(model, tmp_path / "a.patch").__enter__()
    assert caught.value.details == (f"{WEIGHTS[2]}: other weights, not the same ones in BF16 instead of F32",)


def test_one_changed_number_is_another_base(saved: tuple[Model, Path], tmp_path: Path) -> None:
    model, directory = saved
    make_patch(tmp_path / "a.patch", directory)
    before = everything(model)
    model.weight(1).data[3, 5] += 1e-3
    with pytest.raises(Refused) as caught, patched(model, tmp_path / "a.patch"):
        pass
    assert len(caught.value.details) == 1
    assert caught.value.details[0].startswith(f"{WEIGHTS[1]}: expected sha256 ")
    assert torch.equal(model.weight(0), before[WEIGHTS[0]][1])


def test_a_patch_is_on_once(saved: tuple[Model, Path], tmp_path: Path) -> None:
    model, directory = saved
    make_patch(tmp_path / "a.patch", directory)
    before = everything(model)
    with patched(model, tmp_path / "a.patch"):
        inside = model.weight(0).clone()
        stack([tmp_path / "a.patch"], tmp_path / "half.patch", scales=[0.5])
        for name in ("a", "half"):  # itself, and a stack that holds it
            with pytest.raises(Refused, match="already"), patched(model, tmp_path / f"{name}.patch"):
                pass
        assert torch.equal(model.weight(0), inside)
    assert_untouched(model, before)


def test_a_patch_for_other_changes_made_by_hand_is_judged_by_the_base(
    saved: tuple[Model, Path], tmp_path: Path
) -> None:
    model, directory = saved
    make_patch(tmp_path / "a.patch", directory)
    with patched(model, deltas(model)), patched(model, tmp_path / "a.patch"):
        both = model.weight(0).clone()
    with patched(model, tmp_path / "a.patch"), patched(model, deltas(model)):
        assert torch.equal(model.weight(0), both)


def test_what_a_user_should_know(saved: tuple[Model, Path], tmp_path: Path) -> None:
    model, directory = saved
    parent = make_patch(tmp_path / "a.patch", directory, seed=1)
    make_patch(tmp_path / "b.patch", directory, seed=2, parents=[parent])
    heard = Heard()
    with (
        patched(model.net, tmp_path / "a.patch", report=heard),
        patched(model.net, tmp_path / "b.patch", report=heard),
    ):
        assert not heard.warnings  # the parent is on, and a bare network has no tokenizer
    with patched(model.net, tmp_path / "b.patch", model.tokenizer, heard):
        assert len(heard.warnings) == 2
    assert parent[:12] in heard.warnings[0]
    assert "another tokenizer" in heard.warnings[1]


def test_no_patch_at_all(tmp_path: Path) -> None:
    with pytest.raises(BadInput), patched(tiny("llama"), tmp_path / "none.patch"):
        pass


def test_a_patched_model_answers_otherwise() -> None:
    model = tiny("llama")
    ids = torch.tensor([[5, 6, 7]])
    outputs: list[Any] = []
    for change in ({}, deltas(model), {}):
        with patched(model, change), torch.no_grad():
            outputs.append(model.net(input_ids=ids).logits)
    assert torch.equal(outputs[0], outputs[2])
    assert (outputs[0] - outputs[1]).abs().max() > 0.01


@pytest.mark.parametrize("wrong", ["model/", Path("model"), ["model/"], None, 3])
def test_what_is_no_model_is_bad_input(wrong: Any) -> None:
    with pytest.raises(BadInput, match="Expected a model in memory"), patched(wrong, {}):
        pass


@pytest.mark.parametrize("wrong", [["a.patch", "b.patch"], (), None, 3, b"a.patch"])
def test_what_is_no_patch_is_bad_input(wrong: Any) -> None:
    with pytest.raises(BadInput, match=r"Expected (one|a) patch"), patched(tiny("llama"), wrong):
        pass
