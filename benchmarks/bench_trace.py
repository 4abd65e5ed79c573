"""Cells of the hidden-state grid per second: the engine against the oracle, one full forward a cell, in one process.

    python benchmarks/bench_trace.py MODEL
    python benchmarks/bench_trace.py MODEL --oracle 0 --facts 100 --quick

MODEL is any address. Nothing is read from or written to the cache. The oracle runs `--oracle` cells spread evenly over
the grid of each prompt, and both are compared on those; its seconds for a whole grid are that many times more.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kpatch.models.address import resolve  # noqa: E402
from kpatch.models.mixed_precision import mixed_precision  # noqa: E402
from kpatch.models.model import Model, load_model  # noqa: E402
from kpatch.trace.cells import Cell, severed, state, window  # noqa: E402
from kpatch.trace.clean_corrupted import run_clean_and_corrupted  # noqa: E402
from kpatch.trace.engine import trace_cells  # noqa: E402
from kpatch.trace.fact_lists import built_in  # noqa: E402
from kpatch.trace.known import ask_one, subject_items  # noqa: E402
from kpatch.trace.memory import DEFAULT_BUDGET, MemoryBudget  # noqa: E402
from kpatch.trace.noise import draw, spread_of_embeddings  # noqa: E402
from kpatch.trace.run import TraceSettings, trace  # noqa: E402
from tests.oracle import trace as oracle  # noqa: E402

PROMPTS = (
    ("The {} is located in the city of", "Eiffel Tower"),
    ("The capital of {} is", "France"),
    ("{} is a city in the state of", "Chicago"),
)


def peak() -> str:
    text = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB"
    return text + (f" + {torch.cuda.max_memory_allocated() / 2**20:,.0f} MB GPU" if torch.cuda.is_available() else "")


def line(what: str, seconds: float, cells: int, more: str = "") -> float:
    each = seconds / cells
    print(
        f"  {what:36} {cells:5} cells {seconds:8.2f} s {1000 * each:8.1f} ms a cell {1 / each:8.1f} a second  {more}"
    )
    return each


def one_prompt(model: Model, prompt: tuple[str, str], level: float, options: argparse.Namespace) -> None:
    known = ask_one(model, *prompt)
    item, layers = known.item, model.n_layers
    noise = draw(model, item, level, options.samples, 0)
    text = known.fact.text()
    begin = time.perf_counter()
    base = run_clean_and_corrupted(model, [item], [noise])
    clean, corrupted = float(base.probabilities[0]), float(base.probabilities[1:].mean())
    first = time.perf_counter() - begin
    print(f"{text!r} ({len(item.ids)} tokens): P({known.answer}) {clean:.3f} clean, {corrupted:.3f} corrupted")
    tokens = range(len(item.ids))
    grids: dict[str, list[Cell]] = {"states": [state(at, token) for token in tokens for at in range(layers)]}
    if not options.states:
        for site in ("mlp", "attn"):
            width = min(10, layers)
            grids[f"{site} windows"] = [
                window(site, at, token, width, layers) for token in tokens for at in range(layers)
            ]
            grids[f"{site} severed"] = [severed(site, at, item.last, layers) for at in range(layers)]
    found = {}
    for name, cells in grids.items():
        begin = time.perf_counter()
        found[name] = trace_cells(base, [cells], MemoryBudget(options.memory))[0]
        seconds = time.perf_counter() - begin + (first if name == "states" else 0)
        fast = line(name, seconds, len(cells))
        if name == "states":
            each = fast
    if options.oracle:
        spots = [(at, token) for token in tokens for at in range(layers)]
        chosen = range(0, len(spots), max(1, len(spots) // options.oracle))
        begin = time.perf_counter()
        slow = [oracle.state_cell(model, item, noise, *spots[place]) for place in chosen]
        slowly = line("states, oracle", time.perf_counter() - begin, len(slow))
        worst = max(float((one - found["states"][place]).abs().max()) for one, place in zip(slow, chosen, strict=True))
        print(f"  {slowly / each:.1f} times as fast; largest difference {worst:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--oracle", type=int, default=30, help="cells of each grid that the oracle runs; 0: none")
    parser.add_argument("--states", action="store_true", help="the grid of states alone")
    parser.add_argument("--facts", type=int, default=0, help="also trace so many built-in facts as the command does")
    parser.add_argument("--quick", action="store_true", help="of these only the curves")
    parser.add_argument("--memory", type=int, default=DEFAULT_BUDGET, help="bytes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = load_model(resolve(options.model), device=options.device, dtype=options.dtype)
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(
        f"{model.name}, {model.precision}, {model.device}, {threads} threads, load {load:.1f}; {peak()} with the model"
    )
    level = 3.0 * spread_of_embeddings(model, subject_items(model, built_in()))
    warm = ask_one(model, *PROMPTS[0]).item  # what only the first run does is not what is asked
    run_clean_and_corrupted(model, [warm], [draw(model, warm, level, options.samples, 0)])
    for prompt in PROMPTS:
        with mixed_precision(model):  # as the command does
            one_prompt(model, prompt, level, options)
    if options.facts:
        with tempfile.TemporaryDirectory() as cache:
            os.environ["KPATCH_CACHE"] = cache
            settings = TraceSettings(samples=options.samples, window=min(10, model.n_layers), quick=options.quick)
            traces = trace(model, limit=options.facts, settings=settings, budget=options.memory)
        count, seconds = len(traces.facts), traces.seconds
        print(f"{count} facts of {traces.tried} tried: {seconds:.1f} s, {60 * count / seconds:.1f} facts a minute")
    print(f"{peak()} at most")


if __name__ == "__main__":
    main()
