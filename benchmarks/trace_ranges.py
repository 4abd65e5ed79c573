"""Is the R that tracing finds the best to edit? MEMIT with it, and with two other ranges as wide, on the same edits.

    kpatch trace MODEL -o trace/
    python benchmarks/trace_ranges.py MODEL trace/trace.json counterfact.json --count 30

counterfact.json is a JSON list of flat CounterFact records: prompt (with the subject or {}), subject, target_new,
ground_truth, and optionally rephrase_prompt, locality_prompt, locality_ground_truth. One range lies right above R, the
other in the upper half of the stack; --ranges names others. Values and covariance are kept in the cache.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kpatch.edit.make import make
from kpatch.facts.fact import Fact, Neighbor
from kpatch.models.address import resolve
from kpatch.models.model import load_model
from kpatch.trace.fact_lists import slotted
from kpatch.trace.files import read_layers


def read_counterfact(path: Path, count: int) -> list[Fact]:
    facts = []
    for number, row in enumerate(json.loads(path.read_text(encoding="utf-8"))[:count]):
        neighbor = row.get("locality_prompt")
        facts.append(
            Fact(
                row["subject"],
                slotted(row["prompt"], row["subject"]),
                row["target_new"],
                was=row.get("ground_truth"),
                paraphrases=(row["rephrase_prompt"],) if row.get("rephrase_prompt") else (),
                neighbors=(Neighbor(neighbor, row.get("locality_ground_truth")),) if neighbor else (),
                id=str(row.get("case_id", number)),
            )
        )
    return facts


def rivals(found: Sequence[int], layers: int) -> list[list[int]]:
    """Two ranges as wide as R that share no layer with it: the one right above it, and one further up."""
    width = len(found)
    above = list(range(found[-1] + 1, found[-1] + 1 + width))
    upper = list(range(max(above[-1] + 1, (3 * layers) // 5), max(above[-1] + 1, (3 * layers) // 5) + width))
    return [part for part in (above, upper) if part[-1] < layers - 1]


def percent(rate: dict[str, Any] | None, key: str = "success") -> str:
    return "    –" if not rate or rate.get(key) is None else f"{100 * rate[key]:5.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("trace", type=Path, help="trace.json of `kpatch trace MODEL -o`")
    parser.add_argument("counterfact", type=Path)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--ranges", nargs="*", metavar="FIRST-LAST", help="instead of the two rivals")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--corpus", default="self")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = load_model(resolve(options.model), device=options.device, dtype=options.dtype)
    found = read_layers(options.trace, model)
    if options.ranges is None:
        others = rivals(found, model.n_layers)
    else:
        ends = [[int(end) for end in text.split("-")] for text in options.ranges]
        others = [list(range(first, last + 1)) for first, last in ends]
    facts = read_counterfact(options.counterfact, options.count)
    print(f"{model.name}, {model.dtype}, {model.device}; {len(facts)} edits; success in %, and greedy accuracy")
    print("| layers | efficacy | paraphrase | neighborhood | score | greedy | s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for place, layers in enumerate((found, *others)):
            begin = time.monotonic()
            result = make(
                facts,
                out=Path(folder) / f"{place}.patch",
                model=model,
                layers=layers,
                settings=dict(pair.split("=", 1) for pair in options.set),
                corpus=options.corpus,
                tokens=options.tokens,
            )
            rates = (result.effect["before"], result.effect["after"])
            if place == 0:
                show("unedited", rates[0], 0.0)
            name = f"{layers[0]}–{layers[-1]}" + (" (traced)" if place == 0 else "")
            show(name, rates[1], time.monotonic() - begin)


def show(name: str, rates: dict[str, Any], seconds: float) -> None:
    three = [percent(rates.get(key)) for key in ("efficacy", "generalization", "specificity")]
    score = rates.get("score")
    whole = "    –" if score is None else f"{100 * score:5.1f}"
    greedy = percent(rates.get("efficacy"), "accuracy")
    print(f"| {name} | {' | '.join(three)} | {whole} | {greedy} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
