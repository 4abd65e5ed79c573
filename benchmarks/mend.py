"""A trained editor on one, ten and a hundred edits: the sum of updates (MEND) beside ridge regression (MALMEN).

    kpatch train mend smollm2 train.json -o mend.safetensors
    python benchmarks/mend.py smollm2 counterfact.json mend.safetensors -o mend/

The facts are any file that `kpatch import` reads and must not be those of training. n edits are the first n facts in
one update; with n = 1 the first ten are edited one at a time, and their rates are put together. Every result is
OUT/HOW-N.json, and what is there is not done again. OUT/table.md is made of all that is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kpatch.cache import atomic_write_text  # noqa: E402
from kpatch.edit.mend import Mend  # noqa: E402
from kpatch.edit.methods import Inputs, hyper_for  # noqa: E402
from kpatch.edit.weights import add, restored  # noqa: E402
from kpatch.evaluate.metrics import measure  # noqa: E402
from kpatch.evaluate.rates import Outcome, summarize  # noqa: E402
from kpatch.facts.fact import Fact  # noqa: E402
from kpatch.facts.importers.read import import_facts  # noqa: E402
from kpatch.mend.file import read_editor  # noqa: E402
from kpatch.models.model import Model, open_model  # noqa: E402

HOWS = {"unedited": "unedited", "sum": "sum (MEND)", "regression": "regression (MALMEN)"}
PARTS = ("efficacy", "generalization", "specificity")


def outcomes(model: Model, facts: Sequence[Fact], begin: int) -> list[Outcome]:
    """What the model makes of the facts, numbered from `begin` on."""
    found = measure(model, facts, answer_tokens=0).outcomes
    return [replace(one, fact=one.fact + begin) for one in found]


def run(model: Model, method: Mend, facts: Sequence[Fact], how: str, at_once: int) -> tuple[list[Outcome], float]:
    """Facts edited `at_once` at a time and measured in the model so edited; seconds an edit."""
    if how == "unedited":
        return outcomes(model, facts, 0), 0.0
    hyper = hyper_for(method, model, None, {"regression": str(int(how == "regression"))})
    found, seconds = [], 0.0
    for begin in range(0, len(facts), at_once):
        some = facts[begin : begin + at_once]
        started = time.monotonic()
        edit = method.edit(model, some, hyper, Inputs())
        seconds += time.monotonic() - started
        with restored(model, edit.deltas):
            for name, delta in edit.deltas.items():
                add(model, name, delta)
            found += outcomes(model, some, begin)
    return found, seconds / len(facts)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Percent of success, and in brackets of targets that are the first choice; a row for every n and aggregation."""
    headers = ("n", "update", *(part.capitalize() for part in PARTS), "Score", "s per edit")
    lines = ["| " + " | ".join(headers) + " |", "| ---: | --- |" + " ---: |" * (len(headers) - 2)]
    for one in sorted(results, key=lambda one: (one["n"], list(HOWS).index(one["how"]))):
        metrics = one["metrics"]
        cells = [f"{one['n']:,}", HOWS[one["how"]]]
        for part in PARTS:
            rates = metrics[part]
            compared = rates is not None and rates["success"] is not None
            cells.append("–" if not compared else f"{100 * rates['success']:.0f} ({100 * rates['accuracy']:.0f})")
        cells.append("–" if metrics["score"] is None else f"{100 * metrics['score']:.1f}")
        cells.append("–" if one["how"] == "unedited" else f"{one['seconds']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("facts", type=Path)
    parser.add_argument("editor", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the folder for results")
    parser.add_argument("--counts", default="1,10,100")
    parser.add_argument("--singles", type=int, default=10, help="facts that are edited one at a time for n = 1")
    parser.add_argument("--hows", default=",".join(HOWS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    facts = import_facts(options.facts, drop_conflicts=True).facts
    method = Mend(read_editor(options.editor))
    model = open_model(options.model, device=options.device)
    for count in map(int, options.counts.split(",")):
        some = facts[: options.singles if count == 1 else count]
        for how in options.hows.split(","):
            path = options.out / f"{how}-{count}.json"
            if len(some) < count or path.exists():
                continue
            found, seconds = run(model, method, some, how, count)
            result = {"how": how, "n": count, "facts": len(some), "seconds": seconds, "metrics": summarize(found)}
            atomic_write_text(path, json.dumps(result, indent=1))
            print(f"{how}, n = {count}: done", flush=True)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in options.out.glob("*-*.json")]
    atomic_write_text(options.out / "table.md", table(results))
    print(f"\n{table(results)}\n{options.out / 'table.md'}")


if __name__ == "__main__":
    main()
