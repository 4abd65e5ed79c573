"""What a device does in a second, for GPT-J's shape in bfloat16: values, tokens of the covariance, cells of a trace.

    python benchmarks/bench_device.py                     # on a GPU: 6 billion random parameters, 12.1 GB
    python benchmarks/bench_device.py --tiny              # a tiny shape, as on a machine without a GPU

It prints peak memory and what a search for values spends its time on (the profile's top five). Without a GPU it says
so, and runs a tiny shape on the CPU: its figures say only that the program runs.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from shapes import Shape, byte_tokenizer  # noqa: E402

from kpatch.edit.requests import contexts_for, group_facts  # noqa: E402
from kpatch.edit.writes import JointObjective  # noqa: E402
from kpatch.facts.fact import Fact  # noqa: E402
from kpatch.facts.tokens import Item, encode_many  # noqa: E402
from kpatch.models.model import Model, wrap  # noqa: E402
from kpatch.models.partial_forward import Batch, run_to  # noqa: E402
from kpatch.stats.covariance import BATCH_TOKENS  # noqa: E402
from kpatch.stats.moment import SecondMoment  # noqa: E402
from kpatch.trace.cells import state  # noqa: E402
from kpatch.trace.clean_corrupted import Traced, run_clean_and_corrupted  # noqa: E402
from kpatch.trace.engine import trace_cells  # noqa: E402
from kpatch.trace.memory import DEFAULT_BUDGET, MemoryBudget  # noqa: E402
from kpatch.trace.noise import draw  # noqa: E402

TINY = Shape(layers=4, width=64, heads=4, vocabulary=300)
_SEED = 0


def random_model(shape: Shape, device: torch.device) -> Model:
    """Random weights made on the device itself."""
    from transformers import GPTJForCausalLM

    torch.manual_seed(_SEED)
    with torch.device(device):
        net = GPTJForCausalLM(shape.config()).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    return wrap(net, byte_tokenizer(), name=f"random GPT-J, {shape.layers} layers of {shape.width}")


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a second run: the first one warms up."""
    work()
    _wait(device)
    begin = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def values_work(model: Model, facts: int, steps: int) -> Callable[[], Any]:
    """A batch of facts, every step taken: no loss is low enough to stop."""
    asked = [Fact(subject=f"Tower {number}", prompt="The {} stands in", target="Rome") for number in range(facts)]
    groups = group_facts(model, asked, contexts_for(model, 2, 0, 0, _SEED))
    last = max(1, round(0.3 * model.n_layers))
    goal = JointObjective(tuple(range(max(0, last - 5), last + 1)), steps, 0.5, 0.0, 4.0, 0.0625)
    return lambda: goal.search(model, groups)


def covariance_work(model: Model, rows: int, columns: int) -> Callable[[], Any]:
    """One batch of text through the layers below, and its keys into the sums of six of them."""
    last = max(1, round(0.3 * model.n_layers))
    layers = list(range(max(0, last - 5), last + 1))
    ids = torch.randint(1, len(model.tokenizer), (rows, columns)).to(model.device)
    batch = Batch(ids, torch.ones_like(ids), torch.arange(columns, device=model.device).expand(rows, columns), 0)
    sums = {layer: SecondMoment(model.key_width(layer)) for layer in layers}
    for one in sums.values():
        one.to(model.device)

    def work() -> None:
        for layer, keys in run_to(model, last, batch, layers).items():
            sums[layer].add(keys)

    return work


def trace_work(model: Model, samples: int) -> tuple[int, Callable[[], Any]]:
    """The cells of one prompt's grid of states, and what traces them."""
    item = Item("The {} stands in the city of", "Eiffel Tower")
    row = encode_many(model.tokenizer, [item])[0]
    first = row.subject_last - len("Eiffel Tower") + 1
    traced = Traced(row.ids, first, row.subject_last, 1)
    noise = [draw(model, traced, 0.1, samples, _SEED)]
    cells = [state(layer, token) for token in range(len(row.ids)) for layer in range(model.n_layers)]

    def work() -> None:
        trace_cells(run_clean_and_corrupted(model, [traced], noise), [cells], MemoryBudget(DEFAULT_BUDGET))

    return len(cells), work


def top_five(work: Callable[[], Any], device: torch.device) -> list[tuple[str, float]]:
    """The operators that take the most of a run by their own time, each with its share."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as found:
        work()
        _wait(device)
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -float(getattr(event, own)))
    whole = sum(float(getattr(event, own)) for event in events) or 1.0
    return [(str(event.key), float(getattr(event, own)) / whole) for event in events[:5]]


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(shape: Shape, device: torch.device, facts: int, steps: int, samples: int) -> dict[str, Any]:
    """All figures of one shape on one device."""
    model = random_model(shape, device)
    values = values_work(model, facts, steps)
    columns = 256 if device.type == "cuda" else 32
    rows = max(1, BATCH_TOKENS // columns) if device.type == "cuda" else 4
    cells, tracing = trace_work(model, samples)
    return {
        "model": model.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": model.precision,
        "steps": steps,
        "values_per_second": facts / timed(values, device),
        "covariance_tokens_per_second": rows * columns / timed(covariance_work(model, rows, columns), device),
        "trace_cells_per_second": cells / timed(tracing, device),
        "peak_memory_bytes": peak_bytes(device),
        "profile": [{"operator": name, "share": share} for name, share in top_five(values, device)],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, on the CPU")
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available() and not options.tiny
    shape, device = (Shape(), torch.device("cuda:0")) if on_gpu else (TINY, torch.device("cpu"))
    if not torch.cuda.is_available():
        print("No GPU is there: a tiny shape runs on the CPU, and its figures mean nothing.", file=sys.stderr)
    found = measure(shape, device, options.facts, options.steps, options.samples)
    if options.json:
        print(json.dumps(found))
        return 0
    print(f"{found['model']}, {found['dtype']}, {found['device']}")
    print(f"  values               {found['values_per_second']:12.2f} a second ({found['steps']} steps each)")
    print(f"  covariance           {found['covariance_tokens_per_second']:12,.0f} tokens a second, six layers")
    print(f"  trace                {found['trace_cells_per_second']:12.1f} cells a second")
    print(f"  peak memory          {found['peak_memory_bytes'] / 1e6:12,.0f} MB")
    for one in found["profile"]:
        print(f"  {100 * one['share']:5.1f} %  {one['operator']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
