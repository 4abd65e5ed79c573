"""Seconds and memory of the covariance: sampling `self`, and one pass over a text file.

    python benchmarks/bench_covariance.py MODEL_DIR --text words.txt
    python benchmarks/bench_covariance.py MODEL_DIR --text words.txt --batch-tokens 1280,2560,5120

Nothing is cached. Processor seconds stand beside the clock's, and the machine's load, since other work on the same
cores shows in the one and not in the other.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kpatch.models.address import resolve
from kpatch.models.model import load_model
from kpatch.reporter import Advance
from kpatch.stats.covariance import BATCH_TOKENS, collect


class Clock:
    """Prints what each step took."""

    @contextmanager
    def task(self, description: str, total: int | None = None, unit: str = "") -> Iterator[Advance]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield lambda amount: None
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        load = os.getloadavg()[0]
        print(f"  {description:34} {total or 0:>12,} {unit:6} {wall:7.1f} s {cpu:7.1f} s cpu  load {load:.1f}")

    def note(self, message: str) -> None:
        print(f"  {message}")

    warn = note


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", help="a text file; without it only `self` is measured")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens of the text file")
    parser.add_argument("--layers", default="4-8")
    parser.add_argument("--batch-tokens", default=str(BATCH_TOKENS), help="one or more, with commas")
    parser.add_argument("--row", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--skip-self", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    first, _, last = options.layers.partition("-")
    layers = range(int(first), int(last or first) + 1)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["KPATCH_CACHE"] = cache
        model = load_model(resolve(options.model), dtype=options.dtype)
        print(
            f"{model.name}: layers {options.layers}, f = {model.mlp_width}, {model.precision}, {model.device}, ",
            end="",
        )
        print(f"{torch.get_num_threads()} threads; {megabytes():.0f} MB with the model loaded")
        row = options.row or "the usual length"
        if options.text:
            for batch in map(int, options.batch_tokens.split(",")):
                print(f"{Path(options.text).name}, {options.tokens:,} tokens, rows of {row}, batches of {batch}")
                run(model, layers, options, options.text, options.tokens, batch)
        if not options.skip_self:
            print(f"self, {10 * model.mlp_width:,} tokens, rows of {row}")
            run(model, layers, options, "self", None, BATCH_TOKENS)


def run(model, layers, options, corpus, tokens, batch) -> None:  # type: ignore[no-untyped-def]
    wall, cpu = time.perf_counter(), time.process_time()
    collect(
        model,
        layers,
        corpus=corpus,
        tokens=tokens,
        row=options.row,
        batch_tokens=batch,
        report=Clock(),
        use_cache=False,
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"  {'in all':54} {wall:7.1f} s {cpu:7.1f} s cpu; peak {megabytes():.0f} MB")


if __name__ == "__main__":
    main()
