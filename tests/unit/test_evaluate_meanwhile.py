"""Patches tried in memory while other things happen: threads, errors, other orders, dtypes and parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from time import sleep
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kpatch.errors import Refused
from kpatch.evaluate.patched import patched
from kpatch.patch.delta import Dense, LowRank
from tests.support.checkpoints import random
from tests.support.models import tiny
from tests.unit.test_evaluate_patched import Heard, assert_untouched, deltas, everything


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work` in threads that start together, switching often, and raise what one of them raised."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    start = Barrier(count)

    def run(number: int) -> None:
        start.wait()
        work(number)

    try:
        with ThreadPoolExecutor(count) as pool:
            for done in [pool.submit(run, number) for number in range(count)]:
                done.result()
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_threads_leave_the_weights_as_they_were(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    model.net.to(dtype)
    before, rows = everything(model), LowRank.rows
    changes = [deltas(model, seed=10 * number, count=3) for number in range(4)]

    def slowly(delta: LowRank, begin: int, end: int) -> Tensor:
        sleep(2e-3)  # other threads come in between
        return rows(delta, begin, end)

    monkeypatch.setattr(LowRank, "rows", slowly)

    def work(number: int) -> None:
        for _ in range(5):
            with patched(model, changes[number]):
                sleep(3e-3)

    in_threads(len(changes), work)
    assert_untouched(model, before)


def test_threads_see_the_sum_of_what_is_on_and_are_told_so() -> None:
    model, heard = tiny("llama"), Heard()
    before, first, second = everything(model), deltas(model, seed=1), deltas(model, seed=9)
    name = model.weight_name(0)
    both_on, first_left = Barrier(2), Barrier(2)
    seen: list[Tensor] = []

    def work(number: int) -> None:
        if number == 0:
            with patched(model, first):
                both_on.wait()
                both_on.wait()
            first_left.wait()
        else:
            both_on.wait()
            with patched(model, second, report=heard):
                seen.append(model.weight(0).clone())
                both_on.wait()
                first_left.wait()
                seen.append(model.weight(0).clone())

    in_threads(2, work)
    old = before[name][1].double()
    assert torch.equal(seen[0], (old + first[name].dense() + second[name].dense()).float())
    assert torch.equal(seen[1], (old + second[name].dense()).float())
    assert_untouched(model, before)
    assert len(heard.warnings) == 1
    assert "another thread" in heard.warnings[0]


@settings(max_examples=settings.default.max_examples // 4)
@given(steps=st.lists(st.integers(0, 3), max_size=14))
def test_any_order_of_entering_and_leaving_keeps_the_sums_right(steps: list[int]) -> None:
    model = tiny("llama")
    before, changes = everything(model), [deltas(model, seed=10 * number, count=1 + number % 3) for number in range(4)]
    on: dict[int, Any] = {}
    for number in steps:  # each step turns one patch on, or off where it is on
        if number in on:
            on.pop(number).__exit__(None, None, None)
        else:
            on[number] = patched(model, changes[number])
            on[number].__enter__()
        for layer in range(3):
            name = model.weight_name(layer)
            parts = [changes[one][name].dense() for one in on if name in changes[one]]
            expected = (before[name][1].double() + sum(parts, torch.zeros(()))).float()
            assert torch.allclose(model.weight(layer), expected, rtol=0, atol=1e-6)
    for left in on.values():
        left.__exit__(None, None, None)
    assert_untouched(model, before)


def test_what_overflows_when_another_patch_leaves_comes_back_all_the_same() -> None:
    model, heard = tiny("llama"), Heard()
    model.net.to(torch.float16)
    before, name = everything(model), model.weight_name(0)

    def much(value: float) -> dict[str, Dense]:
        return {name: Dense(torch.full(model.weight(0).shape, value))}

    first, less, second = (patched(model, much(value), report=heard) for value in (5e4, -5e4, 5e4))
    for one in (first, less, second):
        one.__enter__()
    less.__exit__(None, None, None)
    assert "out of the range of float16" in heard.warnings[-1]
    first.__exit__(None, None, None)
    assert torch.equal(model.weight(0), (before[name][1].double() + 5e4).half())
    second.__exit__(None, None, None)
    assert_untouched(model, before)


def test_an_error_at_one_weight_does_not_keep_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    before = everything(model)
    outer, inner = patched(model, deltas(model, count=1)), patched(model, deltas(model, seed=9))
    outer.__enter__(), inner.__enter__()

    def fails(*_: Any) -> Tensor:
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr("kpatch.evaluate.patched._State._summed", fails)
        with pytest.raises(MemoryError):  # the first weight cannot be summed, the second needs no sum
            inner.__exit__(None, None, None)
    assert torch.equal(model.weight(1), before[model.weight_name(1)][1])
    outer.__exit__(None, None, None)
    assert_untouched(model, before)


def test_another_dtype_inside_is_followed() -> None:
    model, other = tiny("llama"), tiny("llama")
    first, second = deltas(model, seed=1), deltas(model, seed=9)
    other.net.to(torch.bfloat16)
    with patched(model, first):
        model.net.to(torch.bfloat16)
        with patched(model, second), patched(other, first), patched(other, second):
            assert torch.equal(model.weight(0), other.weight(0))
    for name, weight in model.net.named_parameters():
        assert weight.dtype == torch.bfloat16, name
        assert torch.equal(weight, other.net.get_parameter(name)), name


def test_parameters_that_were_replaced_inside_are_found() -> None:
    model = tiny("llama")
    before = everything(model)
    with patched(model, deltas(model)):
        held = model.down(0).weight
        model.down(0).weight = torch.nn.Parameter(held.detach().clone(), requires_grad=False)
    assert torch.equal(model.weight(0), before[model.weight_name(0)][1])
    assert model.down(0).weight is not held


def test_two_names_of_one_tensor_are_one_weight() -> None:
    net = tiny("llama", tie_word_embeddings=True).net
    head, rows = "lm_head.weight", "model.embed_tokens.weight"
    base, bits = net.get_parameter(rows).data_ptr(), net.get_parameter(rows).detach().clone()
    change = LowRank(random(*(bits.shape[0], 1), seed=1), random(1, bits.shape[1], seed=2))
    one, two = patched(net, {head: change}), patched(net, {rows: change})
    one.__enter__(), two.__enter__()
    assert torch.equal(net.get_parameter(head), (bits.double() + 2 * change.dense()).float())
    one.__exit__(None, None, None), two.__exit__(None, None, None)
    assert net.get_parameter(rows).data_ptr() == base
    assert torch.equal(net.get_parameter(rows), bits)
    with pytest.raises(Refused, match="does not fit"), patched(net, {head: change, rows: change}):
        pass
