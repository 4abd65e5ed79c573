"""Scoring in batches against one row at a time, through the whole network and its whole head."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kpatch.errors import BadInput, CheckFailed
from kpatch.evaluate import score as module
from kpatch.evaluate.score import Scored, score
from kpatch.models.model import Model
from tests.support.families import REPRESENTATIVE, slow_beyond
from tests.support.models import CONFIGS, tiny

torch.set_num_threads(1)

Items = list[tuple[list[int], list[int]]]
IDS = st.lists(st.integers(0, 5), min_size=1, max_size=7)  # few ids, so that prompts share beginnings
ITEMS = st.lists(st.tuples(IDS, st.lists(st.integers(0, 5), min_size=1, max_size=3)), max_size=8)


@cache
def model(family: str = "llama") -> Model:
    return tiny(family)


@torch.no_grad()
def plain(model: Model, prompt: list[int], target: list[int]) -> Scored:
    """One row through the network, every logit formed."""
    logits = model.net(input_ids=torch.tensor([prompt + target])).logits[0].double()
    rows = logits[len(prompt) - 1 : -1]
    logprobs = rows.log_softmax(-1)[range(len(target)), target]
    best = rows.argmax(-1).tolist()
    return Scored(float(logprobs.sum()), float(logprobs.mean()), best == target, best[0])


def agree(found: list[Scored], expected: list[Scored]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.mean_logprob == pytest.approx(other.mean_logprob, abs=1e-5)
        assert one.logprob == pytest.approx(other.logprob, abs=3e-5)
        assert (one.greedy, one.top) == (other.greedy, other.top)


def random_items(count: int, longest: int = 20, seed: int = 0) -> Items:
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high + 1, (1,), generator=generator))
        return [int(i) for i in torch.randint(3, 300, (size,), generator=generator)]

    return [(ids(1, longest), ids(1, 4)) for _ in range(count)]


@pytest.mark.parametrize("family", slow_beyond(REPRESENTATIVE, CONFIGS))
def test_every_family_scores_as_its_plain_forward_does(family: str) -> None:
    items = random_items(8)
    items += [(prompt, [7]) for prompt, _ in items[:3]] + items[:1]
    items += [(prompt, [plain(model(family), prompt, [1]).top]) for prompt, _ in items[:2]]
    found = score(model(family), items)
    agree(found, [plain(model(family), *item) for item in items])
    assert [one.greedy for one in found[-2:]] == [True, True]
    assert not all(one.greedy for one in found)


@settings(max_examples=15)
@given(ITEMS, st.integers(8, 60), st.randoms(use_true_random=False))
def test_order_batches_and_repeats_change_nothing(items: Items, batch_tokens: int, random: Any) -> None:
    expected = [plain(model(), *item) for item in items]
    agree(score(model(), items, batch_tokens), expected)
    order = list(range(len(items)))
    random.shuffle(order)
    agree(score(model(), [items[i] for i in order] * 2), [expected[i] for i in order] * 2)


def test_probabilities_are_the_whole_targets_and_per_token() -> None:
    one = Scored(math.log(0.16), math.log(0.4), False, 3)
    assert one.probability == pytest.approx(0.16)
    assert one.per_token == pytest.approx(0.4)


def test_rows_are_shared_and_the_head_sees_target_positions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[int]] = {"rows": [], "head": []}
    head = model().net.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, inputs, logits: seen["head"].append(logits.shape[:-1].numel()))
    original = module.logits_at

    def spy(model: Model, ids: torch.Tensor, *rest: Any) -> Any:
        seen["rows"].append(len(ids))
        return original(model, ids, *rest)

    monkeypatch.setattr(module, "logits_at", spy)
    prompt = [5, 6, 7, 8, 9]
    try:
        # Two targets of one token, one that goes on behind the first, the same again, and a shorter prompt
        score(model(), [(prompt, [10]), (prompt, [11]), (prompt, [12, 13]), (prompt, [10]), ([5, 6], [7, 8])])
        assert seen == {"rows": [1], "head": [4]}  # after ids 1, 2 (shorter prompt), 4 and 5
        score(model(), [(prompt, [12, 13]), (prompt, [14, 13])])
        assert (seen["rows"][1:], seen["head"][1:]) == ([2], [4])
    finally:
        handle.remove()


def test_the_mlps_see_no_padding_and_the_last_one_only_what_is_read() -> None:
    seen: list[int] = []
    last = model().n_layers - 1
    handles = [
        model().down(layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel()))
        for layer in (0, last)
    ]
    score(model(), [([5] * 9, [6]), ([5, 6], [7, 8])])
    for handle in handles:
        handle.remove()
    assert seen == [9 + 3, 1 + 2]


def test_no_cache_is_filled_for_rows_that_are_run_once() -> None:
    one = torch.tensor([0])
    logits, out = module.logits_at(model(), torch.tensor([[5, 6]]), one, one)
    assert out.past_key_values is None
    assert logits.shape == (1, model().net.config.vocab_size)


def test_nothing_is_left_on_the_network() -> None:
    score(model(), [([5], [6])])
    assert not model().net.get_output_embeddings()._forward_pre_hooks
    with pytest.raises(IndexError):
        score(model(), [([5], [100_000])])
    assert not model().net.get_output_embeddings()._forward_pre_hooks
    assert score(model(), []) == []


@pytest.mark.parametrize("item", [([], [1]), ([1], [])])
def test_an_empty_side_is_refused(item: tuple[list[int], list[int]]) -> None:
    with pytest.raises(BadInput, match=f"Item 1 has an empty {'prompt' if item[1] else 'target'}"):
        score(model(), [([1], [2]), item])


def test_a_row_longer_than_the_model_is_refused() -> None:
    short = tiny("gpt2")  # 128 positions; the last token of a target is never an input
    assert score(short, [([1] * 127, [2, 3])])[0].logprob < 0
    with pytest.raises(BadInput, match="too long") as caught:
        score(short, [([1] * 128, [2, 3])])
    assert caught.value.details == ("expected at most 128 tokens", "found 129")


def test_nan_is_an_answer_of_no() -> None:
    broken = tiny("llama")
    broken.weight(0).data[0, 0] = float("nan")
    with pytest.raises(CheckFailed, match="NaN"):
        score(broken, [([5], [6])])


def test_half_precision_is_summed_in_float32() -> None:
    half = tiny("llama")
    half.net.to(torch.bfloat16)
    items = random_items(6)
    for one, other in zip(score(half, items), (plain(model(), *item) for item in items), strict=True):
        assert one.mean_logprob == pytest.approx(other.mean_logprob, abs=0.15)
        assert one.logprob != other.logprob
