"""What a traced cell costs: columns and MLPs whose result is known are not run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from kpatch.models.partial_forward import Calls
from kpatch.trace.cells import Cell, Traced, severed, state, window
from kpatch.trace.clean_corrupted import Runs, run_clean_and_corrupted
from kpatch.trace.engine import trace_cells
from kpatch.trace.memory import MemoryBudget
from kpatch.trace.noise import draw
from tests.support.models import LAYERS, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = 2
ITEM = Traced((11, 12, 13, 14, 15, 16), 2, 3, 5)
AFTER_ITS_FIRST, AFTER_ITS_LAST = 3, 2  # tokens
ENDS_WITH_ITS_SUBJECT = Traced((11, 12, 13), 2, 2, 5)


def runs_of(family: str, item: Traced = ITEM) -> Runs:
    model = tiny(family)
    return run_clean_and_corrupted(model, [item], [draw(model, item, 1.0, SAMPLES, 0)])


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(layer, columns) of each run of a layer."""
    seen: list[tuple[int, int]] = []
    original = Calls.run_rows

    def watching(self: Calls, hidden: Any, layer: int, rows: Any) -> Any:
        seen.append((layer, hidden.shape[1]))
        return original(self, hidden, layer, rows)

    monkeypatch.setattr(Calls, "run_rows", watching)
    return seen


@contextmanager
def tokens_in_mlps(runs: Runs) -> Iterator[dict[int, int]]:
    """layer → how many tokens reach W^l."""
    seen: dict[int, int] = {}
    handles = []
    for layer in range(LAYERS):

        def hook(module: Any, inputs: Any, layer: int = layer) -> None:
            seen[layer] = inputs[0][..., 0].numel()

        handles.append(runs.model.down(layer).register_forward_pre_hook(hook))
    yield seen
    for handle in handles:
        handle.remove()


def traced(runs: Runs, *cells: Cell) -> torch.Tensor:
    return trace_cells(runs, [list(cells)], MemoryBudget())[0]


def test_a_first_subject_token_that_is_restored_has_the_clean_runs_column(columns: list[tuple[int, int]]) -> None:
    runs = runs_of("llama")
    traced(runs, state(1, ITEM.first))
    assert columns == [(2, AFTER_ITS_FIRST), (3, AFTER_ITS_FIRST)]


def test_a_later_token_and_one_with_a_path_cut_have_their_own_column(columns: list[tuple[int, int]]) -> None:
    traced(runs_of("llama"), state(1, ITEM.last))
    assert columns == [(2, 1 + AFTER_ITS_LAST), (3, 1 + AFTER_ITS_LAST)]
    columns.clear()
    item = Traced(ITEM.ids, 2, 2, 5)
    traced(runs_of("llama", item), severed("mlp", 1, item.last, LAYERS))
    assert columns == [(2, 1 + AFTER_ITS_FIRST), (3, 1 + AFTER_ITS_FIRST)]


def test_a_restored_token_with_nothing_behind_it_gives_the_clean_run(columns: list[tuple[int, int]]) -> None:
    runs = runs_of("llama", ENDS_WITH_ITS_SUBJECT)
    found = traced(runs, *(state(layer, 2) for layer in range(LAYERS)))
    assert not columns
    assert torch.equal(found, runs.probabilities[:1].expand(LAYERS, SAMPLES))


@pytest.mark.parametrize(
    ("family", "left_out"),
    [("llama", 1), ("falcon", 1), ("gemma2", 0), ("bloom", 0)],  # a norm and a sum stand behind the last two's MLPs
)
def test_an_mlp_does_not_run_where_its_output_is_given(family: str, left_out: int) -> None:
    runs = runs_of(family)
    cells: Sequence[Cell] = [window("mlp", 1, ITEM.last, 2, LAYERS)]
    with tokens_in_mlps(runs) as seen:
        traced(runs, *cells)
    each = 1 + AFTER_ITS_LAST
    assert seen == {
        0: SAMPLES * (each - left_out),
        1: SAMPLES * (each - left_out),
        2: SAMPLES * each,
        3: SAMPLES,  # in the last layer the last token alone
    }


def test_the_last_layers_mlp_runs_on_nothing_where_its_output_is_given() -> None:
    runs, end = runs_of("llama"), len(ITEM.ids) - 1
    with tokens_in_mlps(runs) as seen:
        found = traced(runs, window("mlp", LAYERS - 1, end, 1, LAYERS))
    assert seen == {LAYERS - 1: 0}
    assert not torch.equal(found, runs.probabilities[1:][None])
