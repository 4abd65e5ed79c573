"""The engine against the oracle, cell by cell: every family, three kinds, both severings, both ends of the stack."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from kpatch.models.model import Model
from kpatch.trace.cells import Cell, Point, Traced, everything, severed, state, window
from kpatch.trace.clean_corrupted import Runs, run_clean_and_corrupted
from kpatch.trace.engine import trace_cells
from kpatch.trace.memory import MemoryBudget
from kpatch.trace.noise import draw
from tests.oracle import trace as oracle
from tests.support.families import KINDS, REPRESENTATIVE, slow_beyond
from tests.support.models import LAYERS, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in KINDS},
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "opt-as-wide-as-its-embeddings": ("opt", {"word_embed_proj_dim": 32}),
    "llama-eager": ("llama", {"attn_implementation": "eager"}),
    "qwen2-sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"] * 2},
    ),
}
# (tokens, subject's first and last token): in the middle; one token at position 0; one token; at the prompt's end
SHAPES = [(8, 2, 4), (5, 0, 0), (6, 3, 3), (4, 1, 3)]
SAMPLES = 3
WIDTHS = (1, 2, 3, LAYERS)


@cache
def build(case: str) -> Model:
    family, settings = CASES[case]
    return tiny(family, **settings)


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest) -> Model:
    return build(request.param)


# All of CASES in `make test`, a few in a plain `pytest`
# Beside each other in one layer, and behind a norm each
QUICK_WINDOWS = (("phi", "mlp"), ("gemma3_text", "attn"))
some_cases = pytest.mark.parametrize("model", slow_beyond(REPRESENTATIVE, CASES), indirect=True)


@cache
def facts(case: str) -> tuple[list[Traced], list[Tensor]]:
    """Random prompts, each with the model's own first choice as its answer, and their noise."""
    model = build(case)
    generator = torch.Generator().manual_seed(7)
    items = []
    for length, first, last in SHAPES:
        ids = torch.randint(1, len(model.tokenizer), (length,), generator=generator)
        with torch.no_grad():
            answer = int(model.net(input_ids=ids[None]).logits[0, -1].argmax())
        items.append(Traced(tuple(ids.tolist()), first, last, answer))
    return items, [draw(model, item, 1.5, SAMPLES, 0) for item in items]


def case_of(model: Model) -> str:
    return next(case for case in CASES if build(case) is model)


@cache
def base_of(case: str) -> Runs:
    items, noise = facts(case)
    return run_clean_and_corrupted(build(case), items, noise)


def check(got: Tensor, want: Tensor) -> None:
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-8)


def compare(model: Model, cells: Callable[[Traced], list[tuple[Cell, Callable[[Tensor], Tensor]]]]) -> None:
    """All cells of all facts in one batch, each against what the oracle says of it alone."""
    items, noise = facts(case_of(model))
    wanted = [cells(item) for item in items]
    found = trace_cells(base_of(case_of(model)), [[cell for cell, _ in several] for several in wanted], MemoryBudget())
    spread = []
    for several, values, drawn in zip(wanted, found, noise, strict=True):
        assert values.shape == (len(several), SAMPLES)
        for (_, slow), got in zip(several, values, strict=True):
            want = slow(drawn)
            check(got, want)
            spread.append(want)
    values = torch.stack(spread)
    assert values.std() > 0.01 * values.mean(), "cells that all agree would prove nothing"


def test_clean_and_corrupted_runs(model: Model) -> None:
    items, noise = facts(case_of(model))
    base = base_of(case_of(model))
    for number, (item, drawn) in enumerate(zip(items, noise, strict=True)):
        clean, corrupted = oracle.clean_and_corrupted(model, item, drawn)
        check(base.probabilities[number], torch.tensor(clean, dtype=torch.float64))
        check(base.probabilities[list(base.corrupted(number))], corrupted)
        assert (corrupted - clean).abs().max() > 0.01 * clean


@some_cases
def test_states(model: Model) -> None:
    def cells(item: Traced) -> list[tuple[Cell, Callable[[Tensor], Tensor]]]:
        return [
            (state(layer, token), lambda noise, at=(layer, token): oracle.state_cell(model, item, noise, *at))
            for token in range(len(item.ids))
            for layer in range(LAYERS)
        ]

    compare(model, cells)


@pytest.mark.parametrize(
    ("model", "site"),
    [
        pytest.param(
            name, site, marks=[] if (name, site) in QUICK_WINDOWS else [pytest.mark.slow], id=f"{site}-{name}"
        )
        for site in ("mlp", "attn")
        for name in CASES
    ],
    indirect=["model"],
)
def test_windows(model: Model, site: Any) -> None:
    """Every width at every layer, so also windows cut off at both ends of the stack."""

    def cells(item: Traced) -> list[tuple[Cell, Callable[[Tensor], Tensor]]]:
        tokens = sorted({item.first, item.last, len(item.ids) - 1})
        return [
            (
                window(site, layer, token, width, LAYERS),
                lambda noise, at=(layer, token, width): oracle.window_cell(model, item, noise, site, *at),
            )
            for width in WIDTHS
            for token in tokens
            for layer in range(LAYERS)
        ]

    compare(model, cells)


@pytest.mark.parametrize("model", slow_beyond(["gpt_neox", "llama", "gemma3_text"], CASES), indirect=True)
@pytest.mark.parametrize("site", ["mlp", "attn"])
def test_severed_paths(model: Model, site: Any) -> None:
    def cells(item: Traced) -> list[tuple[Cell, Callable[[Tensor], Tensor]]]:
        return [
            (
                severed(site, layer, item.last, LAYERS),
                lambda noise, at=layer: oracle.severed_cell(model, item, noise, site, at),
            )
            for layer in range(LAYERS)
        ]

    compare(model, cells)


def test_many_points_at_once(model: Model) -> None:
    """Restores and freezes of all kinds, tokens and layers together, the last layer's unread outputs among them."""
    spots = [("attn", 1, -2), ("mlp", 3, -1), ("state", 0, -3), ("mlp", 3, -2), ("attn", 3, -1), ("state", 2, -2)]
    cut = [("mlp", 2, -2), ("attn", 2, -1), ("mlp", 0, -3), ("state", 1, -1)]

    def cells(item: Traced) -> list[tuple[Cell, Callable[[Tensor], Tensor]]]:
        end = len(item.ids)
        points = [tuple((site, layer, end + token) for site, layer, token in part) for part in (spots, cut)]
        restore, freeze = (tuple(Point(*spot) for spot in part) for part in points)  # type: ignore[arg-type]

        def slow(noise: Tensor) -> Tensor:
            _, corrupted = oracle.forward(model, item, noise)
            return oracle.forward(model, item, noise, points[0], points[1], corrupted)[0][1:]

        return [(Cell(restore, freeze), slow)]

    compare(model, cells)


# Laws


@some_cases
def test_restoring_everything_gives_the_clean_run_and_nothing_the_corrupted(model: Model) -> None:
    case = case_of(model)
    items, _ = facts(case)
    base = base_of(case)
    cells = [
        [
            everything(LAYERS, range(len(item.ids))),
            Cell(tuple(Point("state", 0, token) for token in range(len(item.ids)))),
            Cell(()),
            Cell((), (Point("mlp", 1, item.last),)),
            *(state(layer, token) for token in range(item.first) for layer in range(LAYERS)),
        ]
        for item in items
    ]
    for number, values in enumerate(trace_cells(base, cells, MemoryBudget())):
        corrupted = base.probabilities[list(base.corrupted(number))]
        check(values[0], base.probabilities[number].expand(SAMPLES))
        check(values[1], base.probabilities[number].expand(SAMPLES))
        for unchanged in values[2:]:
            assert torch.equal(unchanged, corrupted)


@some_cases
def test_the_last_layers_last_token_is_all_that_is_read(model: Model) -> None:
    case = case_of(model)
    items, _ = facts(case)
    base = base_of(case)
    cells = [[state(LAYERS - 1, token) for token in range(len(item.ids))] for item in items]
    for number, values in enumerate(trace_cells(base, cells, MemoryBudget())):
        check(values[-1], base.probabilities[number].expand(SAMPLES))
        for unchanged in values[:-1]:
            assert torch.equal(unchanged, base.probabilities[list(base.corrupted(number))])


@some_cases
def test_severing_nothing_is_plain(model: Model) -> None:
    """Cutting a path below the restored layer, or above the stack, changes nothing."""
    items, _ = facts(case_of(model))
    cells = []
    for item in items:
        below = Cell((Point("state", 2, item.last),), tuple(Point("mlp", at, item.last) for at in range(3)))
        cells.append([state(2, item.last), below, state(LAYERS - 1, item.last), severed("mlp", 3, item.last, LAYERS)])
    for values in trace_cells(base_of(case_of(model)), cells, MemoryBudget()):
        assert torch.equal(values[0], values[1])
        assert torch.equal(values[2], values[3])


@some_cases
def test_a_cell_does_not_depend_on_its_company(model: Model) -> None:
    """Alone, in batches of one cell, or beside longer prompts: the same to rounding."""
    case = case_of(model)
    items, noise = facts(case)
    cells = [[state(1, item.last), window("mlp", 1, item.last, 2, LAYERS)] for item in items]
    together = trace_cells(base_of(case), cells, MemoryBudget())
    for number, item in enumerate(items):
        alone = run_clean_and_corrupted(model, [item], [noise[number]])
        check(trace_cells(alone, [cells[number]], MemoryBudget(budget=1))[0], together[number])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_agrees(model: Model) -> None:
    case = case_of(model)
    items, noise = facts(case)
    cells = [[state(1, item.last), severed("mlp", 0, item.last, LAYERS)] for item in items]
    there = Model(net=copy.deepcopy(model.net).cuda(), tokenizer=model.tokenizer, family=model.family)
    found = trace_cells(run_clean_and_corrupted(there, items, noise), cells, MemoryBudget())
    for got, want in zip(found, trace_cells(base_of(case), cells, MemoryBudget()), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


@some_cases
def test_one_sample(model: Model) -> None:
    items, noise = facts(case_of(model))
    item, drawn = items[0], noise[0][:1]
    base = run_clean_and_corrupted(model, [item], [drawn])
    (values,) = trace_cells(base, [[state(1, item.last)]], MemoryBudget())
    check(values[0], oracle.state_cell(model, item, drawn, 1, item.last))
