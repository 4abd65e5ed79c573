"""A whole run: what is computed, kept, gone on with, and what happens when memory or patience ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from kpatch.cache import cache_dir
from kpatch.errors import BadInput
from kpatch.models.partial_forward import Calls
from kpatch.reporter import Advance
from kpatch.trace import run as run_module
from kpatch.trace.cells import state
from kpatch.trace.engine import trace_cells
from kpatch.trace.memory import MemoryBudget, out_of_memory, row_bytes, runs_bytes
from kpatch.trace.run import FactTrace, Traces, TraceSettings, trace
from tests.oracle import trace as oracle
from tests.support.models import LAYERS, tiny
from tests.support.reports import Recorder
from tests.support.tracing import known_facts, model_of

QUICK = TraceSettings(samples=3, window=2, quick=True)
FULL = TraceSettings(samples=3, window=2)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many facts each clean and corrupted run took; facts found in the cache take none."""
    counted: list[int] = []
    original = run_module.run_clean_and_corrupted

    def counting(model: Any, items: Any, noise: Any) -> Any:
        counted.append(len(items))
        return original(model, items, noise)

    monkeypatch.setattr(run_module, "run_clean_and_corrupted", counting)
    return counted


def same(one: Traces, other: Traces, exact: bool = True) -> None:
    assert len(one.facts) == len(other.facts)
    for a, b in zip(one.facts, other.facts, strict=True):
        assert (a.fact, a.answer, a.tokens, a.first, a.last) == (b.fact, b.answer, b.tokens, b.first, b.last)
        pairs = [(a.curves, b.curves), *((a.grids[kind], b.grids[kind]) for kind in a.grids)]
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs, rtol=0 if exact else 1e-4, atol=0)


def test_numbers_are_the_oracles() -> None:
    model = model_of()
    traces = trace(model, known_facts()[:2], settings=FULL)
    assert traces.tried == 2
    level = 3.0 * traces.sigma
    for fact in traces.facts:
        items, noise = item_and_noise(model, fact, level)
        clean, corrupted = oracle.clean_and_corrupted(model, items, noise)
        assert fact.clean == pytest.approx(clean, rel=1e-5)
        assert fact.corrupted == pytest.approx(float(corrupted.mean()), rel=1e-5)
        count = len(fact.tokens)
        for kind in ("state", "mlp", "attn"):
            assert fact.grids[kind].shape == (count, LAYERS)
        for layer in range(LAYERS):
            last = fact.last
            near(fact.curves[0, layer], oracle.state_cell(model, items, noise, layer, last))
            near(fact.curves[1, layer], oracle.severed_cell(model, items, noise, "mlp", layer))
            near(fact.curves[2, layer], oracle.severed_cell(model, items, noise, "attn", layer))
            assert fact.curves[0, layer] == fact.grids["state"][last, layer]
            for token in range(count):
                near(fact.grids["state"][token, layer], oracle.state_cell(model, items, noise, layer, token))
            for token in (0, last, count - 1):
                near(fact.grids["mlp"][token, layer], oracle.window_cell(model, items, noise, "mlp", layer, token, 2))
                near(
                    fact.grids["attn"][token, layer], oracle.window_cell(model, items, noise, "attn", layer, token, 2)
                )


def near(got: Tensor, samples: Tensor) -> None:
    assert float(got) == pytest.approx(float(samples.mean()), rel=1e-5)


def item_and_noise(model: Any, fact: FactTrace, level: float) -> Any:
    from kpatch.trace.known import find_known
    from kpatch.trace.noise import draw

    item = find_known(model, [fact.fact]).known[0].item
    return item, draw(model, item, level, 3, 0)


def test_a_quick_run_has_the_curves_of_a_full_one() -> None:
    quick, full = trace(model_of(), known_facts(), settings=QUICK), trace(model_of(), known_facts(), settings=FULL)
    assert all(not fact.grids for fact in quick.facts)
    for a, b in zip(quick.facts, full.facts, strict=True):
        assert torch.equal(a.curves, b.curves), "taken from the cache"
        torch.testing.assert_close(b.grids["state"][b.last], a.curves[0], rtol=1e-5, atol=0)


def test_results_are_kept_by_content(runs: list[int]) -> None:
    model, facts = model_of(), known_facts()
    first = trace(model, facts, settings=QUICK)
    assert sum(runs) == len(facts)
    same(first, trace(model, facts, settings=QUICK))
    assert sum(runs) == len(facts), "nothing was run again"
    same(first, trace(model, facts, settings=QUICK, resume=False))
    assert sum(runs) == 2 * len(facts)


@pytest.mark.parametrize(
    "change",
    [{"samples": 4}, {"noise": 2.0}, {"seed": 1}, {"quick": False}],
    ids=str,
)
def test_other_settings_are_run_anew(change: dict[str, Any], runs: list[int]) -> None:
    facts = known_facts()[:1]
    trace(model_of(), facts, settings=QUICK)
    runs.clear()
    trace(model_of(), facts, settings=TraceSettings(**{"samples": 3, "window": 2, "quick": True, **change}))
    assert runs == [1]


def test_another_window_runs_only_what_has_one(runs: list[int]) -> None:
    facts = known_facts()[:1]
    report = Recorder()
    trace(model_of(), facts, settings=FULL)
    trace(model_of(), facts, settings=TraceSettings(samples=3, window=3), report=report)
    cells, done = report.tasks["Tracing"]
    first = len(trace(model_of(), facts, settings=FULL).facts[0].tokens)
    assert cells == done
    assert cells is not None
    assert 0 < cells <= 2 * first * LAYERS, "the two grids with a window"


def test_other_weights_are_run_anew(runs: list[int]) -> None:
    fact = known_facts()[0]
    trace(model_of(), [fact], settings=QUICK)
    changed = tiny("llama")
    changed.weight(0).mul_(1 + 1e-6)
    trace(changed, [fact], settings=QUICK)
    assert runs == [1, 1]


def test_a_damaged_file_of_the_cache_is_run_anew(runs: list[int]) -> None:
    facts = known_facts()[:1]
    whole = trace(model_of(), facts, settings=QUICK)
    (path,) = cache_dir("traces").iterdir()
    kept = json.loads(path.read_text())
    for damage in ("", "{}", json.dumps({**kept, "values": kept["values"][:-1]}), json.dumps({**kept, "clean": 7})):
        path.write_text(damage)
        runs.clear()
        same(whole, trace(model_of(), facts, settings=QUICK))
        assert runs == [1]


class Impatient(Recorder):
    """Presses Ctrl-C after some cells."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    @contextmanager
    def task(self, description: str, total: int | None = None, unit: str = "") -> Iterator[Advance]:
        with super().task(description, total, unit) as advance:

            def counted(amount: int) -> None:
                advance(amount)
                if description == "Tracing" and self.tasks[description][1] >= self.after:
                    raise KeyboardInterrupt

            yield counted


def test_what_was_done_before_ctrl_c_is_not_done_again(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryBudget, "facts", lambda *_: 1)
    model, facts = model_of(), known_facts()
    assert len(facts) >= 5
    whole = trace(model, facts, settings=QUICK, resume=False)
    for path in cache_dir("traces").iterdir():
        path.unlink()
    runs.clear()
    cells = 3 * LAYERS - 2  # above the last layer there is nothing to sever: one cell for all three curves
    with pytest.raises(KeyboardInterrupt):
        trace(model, facts, settings=QUICK, report=Impatient(after=2 * cells + 1))
    assert len(runs) == 3
    assert len(list(cache_dir("traces").iterdir())) == 2, "the third was not whole"
    runs.clear()
    report = Recorder()
    same(whole, trace(model, facts, settings=QUICK, report=report))
    assert len(runs) == len(facts) - 2
    assert any(note.startswith(f"2 of {len(facts)} facts were traced before") for note in report.notes)
    assert report.tasks["Tracing"] == ((len(facts) - 2) * cells, (len(facts) - 2) * cells)


def test_what_is_said() -> None:
    report = Recorder()
    traces = trace(model_of(), [*known_facts(), *known_facts()], limit=3, settings=QUICK, report=report)
    assert len(traces.facts) == 3
    assert any(f"3 of {traces.tried} facts tried" in note for note in report.notes)
    assert report.tasks["Tracing"][0] == report.tasks["Tracing"][1]


def test_one_prompt() -> None:
    traces = trace(model_of(), prompt=("The {} is in", "Eiffel Tower"), settings=FULL)
    (fact,) = traces.facts
    assert fact.fact.text() == "The Eiffel Tower is in"
    assert fact.grids["state"].shape == (len(fact.tokens), LAYERS)
    many = trace(model_of(), known_facts(), settings=FULL)
    assert traces.sigma != many.sigma, "of the built-in facts' subjects"


# Memory


@cache
def unbounded() -> Traces:
    return trace(model_of(), known_facts()[:4], settings=FULL, resume=False)


@pytest.mark.parametrize("budget", [pytest.param(1, marks=pytest.mark.slow), 100_000, 10_000_000_000])
def test_results_do_not_depend_on_the_budget(budget: int) -> None:
    found = trace(model_of(), known_facts()[:4], settings=FULL, budget=budget, resume=False)
    same(found, unbounded(), exact=False)


def test_batches_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = model_of(), []
    original = Calls.run_rows

    def watching(self: Calls, hidden: Tensor, layer: int, rows: Tensor) -> Tensor:
        seen.append(hidden.shape[0] * row_bytes(model, hidden.shape[1], 12))
        return original(self, hidden, layer, rows)

    monkeypatch.setattr(Calls, "run_rows", watching)
    budget = 2_000_000
    trace(model, known_facts()[:3], settings=FULL, budget=budget, resume=False)
    assert 0.2 * budget < max(seen) <= budget


def test_facts_share_a_run_as_far_as_memory_goes() -> None:
    model = model_of()
    each = runs_bytes(model, 10, 3)
    assert MemoryBudget(4 * 3 * each).facts(model, [(10, 4)] * 8, 3) == 3
    assert MemoryBudget(4 * 3 * each).facts(model, [(10, 4), (10, 4), (30, 4)], 3) == 2, "the longest counts for all"
    assert MemoryBudget(1).facts(model, [(10, 4)] * 8, 3) == 1
    assert MemoryBudget().facts(model, [(10, 4)] * 8, 3) == 8
    assert MemoryBudget().facts(model, [(10, 300)] * 8, 10) == 1, "one fact fills the batches"


OTHER_ERRORS = [pytest.param(error, marks=pytest.mark.slow) for error in (MemoryError, RuntimeError)]


def oom_above(
    rows: int, monkeypatch: pytest.MonkeyPatch, error: type[Exception] = torch.OutOfMemoryError
) -> list[int]:
    """Let layers run out of memory with more than `rows` rows; the sizes that were tried."""
    tried: list[int] = []
    original = Calls.run_rows

    def limited(self: Calls, hidden: Tensor, layer: int, chosen: Tensor) -> Tensor:
        tried.append(len(hidden))
        if len(hidden) > rows:
            raise error("can't allocate memory")
        return original(self, hidden, layer, chosen)

    monkeypatch.setattr(Calls, "run_rows", limited)
    return tried


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, *OTHER_ERRORS])
def test_out_of_memory_halves_the_batch_and_says_so_once(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = known_facts()[:3]
    want = trace(model_of(), facts, settings=FULL, resume=False)
    tried = oom_above(13, monkeypatch, error)
    report = Recorder()
    same(trace(model_of(), facts, settings=FULL, resume=False, report=report), want, exact=False)
    assert len(report.warnings) == 1
    assert "continuing with half of them" in report.warnings[0]
    assert report.tasks["Tracing"][0] == report.tasks["Tracing"][1], "nothing is counted twice"
    failures = [rows for rows in tried if rows > 13]
    assert len(failures) <= 8, "what did not fit is not tried again and again"


def test_one_cell_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    oom_above(2, monkeypatch)
    with pytest.raises(BadInput, match="fit in this device's memory"):
        trace(model_of(), known_facts()[:1], settings=FULL)


def test_facts_that_do_not_fit_together_are_run_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = known_facts()
    want = trace(model_of(), facts, settings=QUICK, resume=False)
    original, sizes = run_module.run_clean_and_corrupted, []

    def limited(model: Any, items: Any, noise: Any) -> Any:
        sizes.append(len(items))
        if len(items) > 2:
            raise torch.OutOfMemoryError("no more")
        return original(model, items, noise)

    monkeypatch.setattr(run_module, "run_clean_and_corrupted", limited)
    report = Recorder()
    same(trace(model_of(), facts, settings=QUICK, resume=False, report=report), want, exact=False)
    assert max(sizes) > 2
    assert len(report.warnings) == 1


def test_another_error_is_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Calls, "run_rows", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        trace(model_of(), known_facts()[:1], settings=QUICK)
    assert not out_of_memory(RuntimeError("mat1"))


# Wrong input


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (TraceSettings(noise=0), "`noise=0` corrupts nothing"),
        (TraceSettings(noise=-1), "`noise=-1"),
        (TraceSettings(noise=float("nan")), "`noise=nan"),
        (TraceSettings(noise=float("inf")), "`noise=inf"),
        (TraceSettings(samples=0), "`samples=0"),
        (TraceSettings(window=0), "`window=0"),
        (TraceSettings(window=LAYERS + 1), f"`window={LAYERS + 1}` does not fit"),
    ],
)
def test_settings_that_make_no_sense(settings: TraceSettings, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        trace(model_of(), known_facts(), settings=settings)
    assert said in caught.value.message
    assert caught.value.details


def test_a_window_is_of_no_matter_to_a_quick_run() -> None:
    assert trace(model_of(), known_facts()[:1], settings=TraceSettings(samples=2, quick=True)).facts


def test_no_facts() -> None:
    with pytest.raises(BadInput, match="no facts"):
        trace(model_of(), [], settings=QUICK)


def test_work_below_the_restored_layer_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell at layer l and token t runs L - l - 1 layers on the columns from t on, and nothing else."""
    from kpatch.trace.clean_corrupted import run_clean_and_corrupted
    from kpatch.trace.known import find_known
    from kpatch.trace.noise import draw

    model = model_of()
    item = find_known(model, known_facts()[:1]).known[0].item
    base = run_clean_and_corrupted(model, [item], [draw(model, item, 1.0, 3, 0)])
    work: list[tuple[int, tuple[int, ...]]] = []
    original = Calls.run_rows

    def watching(self: Calls, hidden: Tensor, layer: int, rows: Tensor) -> Tensor:
        work.append((layer, tuple(hidden.shape[:2])))
        return original(self, hidden, layer, rows)

    monkeypatch.setattr(Calls, "run_rows", watching)
    token = item.last
    columns = len(item.ids) - token
    trace_cells(base, [[state(2, token), state(0, token)]], MemoryBudget())
    assert work == [(1, (3, columns)), (2, (3, columns)), (3, (6, columns))]
