"""Rows that join others and rows with a common beginning write what each writes alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from kpatch.evaluate.complete import complete
from kpatch.evaluate.running import Running, has_plain_cache
from kpatch.models.model import Model
from tests.support.families import REPRESENTATIVE, slow_beyond
from tests.support.models import CONFIGS, tiny

torch.set_num_threads(1)

START = list(range(20, 32))  # what all rows begin with, long enough to be run once
ROWS = [[*START, 40], [*START, 41, 42, 43, 44, 45], [*START, 46, 47], [*START, *range(50, 70)]]


def sizes_of(model: Model, *more: Any, **options: Any) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """What `complete` writes, and the shape of the ids of each run of the network."""
    shapes: list[tuple[int, ...]] = []
    handle = model.net.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: shapes.append(tuple(args[0].shape))  # OPT's network passes its base model by
    )
    found = complete(model, *more, **options)
    handle.remove()
    return [answer.ids for answer in found], shapes


@pytest.mark.parametrize("family", slow_beyond(REPRESENTATIVE, CONFIGS))
def test_a_common_beginning_is_run_once(family: str) -> None:
    model = tiny(family)
    alone = [complete(model, [row], 5, top=3)[0] for row in ROWS]
    together = complete(model, ROWS, 5, top=3)
    for one, other in zip(alone, together, strict=True):
        assert one.ids == other.ids
        assert [chance for _, chance in one.top] == pytest.approx([chance for _, chance in other.top], abs=1e-5)
    _, shapes = sizes_of(model, ROWS, 1)
    assert shapes == ([(1, 12), (4, 20)] if has_plain_cache(model) else [(4, 32)])


def test_a_row_that_is_all_common_runs_its_last_token() -> None:
    model = tiny("llama")
    rows = [START, [*START, 40, 41]]
    assert [one.ids for one in complete(model, rows, 4)] == [complete(model, [row], 4)[0].ids for row in rows]


@pytest.mark.parametrize("family", slow_beyond(REPRESENTATIVE, CONFIGS))
def test_rows_join_where_others_have_left(family: str) -> None:
    model = tiny(family)
    rows = [[number, *range(10, 10 + number % 7)] for number in range(80, 104)]
    room = [2 + number % 9 for number in range(len(rows))]
    alone = [complete(model, [row], most)[0].ids for row, most in zip(rows, room, strict=True)]
    found, shapes = sizes_of(model, rows, room, batch_tokens=24)
    assert found == alone
    counts = [count for count, width in shapes if width == 1]
    rises = sum(later > earlier for earlier, later in itertools.pairwise(counts))
    assert rises > 0
    if has_plain_cache(model):
        assert max(counts) * 4 <= 4 * 24, "no more columns are held than the limit says"


def test_joined_rows_score_and_draw_as_alone() -> None:
    model = tiny("llama")
    rows = [[number, *range(10, 10 + number % 7)] for number in range(80, 92)]
    targets = [[[7], [8, 9]] for _ in rows]
    draws = [torch.rand(5, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in range(len(rows))]
    options: dict[str, Any] = {"among": 5, "top": 2}
    together = complete(model, rows, 5, batch_tokens=24, draws=draws, targets=targets, **options)
    for row, some, asked, answer in zip(rows, draws, targets, together, strict=True):
        alone = complete(model, [row], 5, draws=[some], targets=[asked], **options)[0]
        assert answer.ids == alone.ids
        for one, other in zip(answer.scored, alone.scored, strict=True):
            assert one.mean_logprob == pytest.approx(other.mean_logprob, abs=1e-5)


def test_joining_cuts_padding_that_no_row_needs() -> None:
    model = tiny("llama")
    long, short = Running(model, [0, 1], [[5, 6], list(range(5, 25))]), Running(model, [2], [[7, 8, 9]])
    for one in (long, short):
        one.take(one.step().argmax(-1))
    long.keep([0])
    long.join(short)
    assert (long.numbers, long.width) == ([0, 2], 4)
    logits = long.step()
    expected = complete(model, [[5, 6], [7, 8, 9]], 2)
    assert logits.argmax(-1).tolist() == [one.ids[1] for one in expected]
