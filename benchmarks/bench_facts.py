"""How long fact files take: load and check 100,000 facts in each format, and tokenize them.

    python benchmarks/bench_facts.py [--facts 100000] [--tokenizer DIRECTORY]

Each row is the best of three runs in this process; memory is the process's peak after the row's runs.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kpatch.errors import BadInput
from kpatch.facts.fact import FACT_KEYS
from kpatch.facts.lint import lint
from kpatch.facts.load import load_facts
from kpatch.facts.tokens import encode_many


def made_up(count: int) -> list[dict[str, Any]]:
    """Facts as full as real ones: an old answer, two paraphrases, a neighbor."""
    return [
        {
            "subject": f"Person Number {index}",
            "prompt": "{} was born in the city of",
            "target": f"Town {index % 977}",
            "was": f"Village {index % 571}",
            "paraphrases": ["{} comes from", "The birthplace of {} is"],
            "neighbors": [{"prompt": f"Somebody Else {index} was born in the city of", "target": "Paris"}],
        }
        for index in range(count)
    ]


def write_yaml(path: Path, facts: list[dict[str, Any]]) -> None:
    lines = ["version: 1", "facts:"]
    for fact in facts:
        lines += [
            f"  - subject: {fact['subject']}",
            f'    prompt: "{fact["prompt"]}"',
            f"    target: {fact['target']}",
        ]
        lines += [f"    was: {fact['was']}", f"    paraphrases: {json.dumps(fact['paraphrases'])}"]
        lines += [f"    neighbors: {json.dumps(fact['neighbors'])}"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_jsonl(path: Path, facts: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(fact) + "\n" for fact in facts), encoding="utf-8")


def write_csv(path: Path, facts: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [key for key in FACT_KEYS if key in facts[0]])
        writer.writeheader()
        for fact in facts:
            neighbors = " | ".join(f"{n['prompt']} -> {n['target']}" for n in fact["neighbors"])
            writer.writerow({**fact, "paraphrases": " | ".join(fact["paraphrases"]), "neighbors": neighbors})


def refused(path: Path) -> None:
    """Load a file in which every fact has an error."""
    try:
        load_facts(path)
    except BadInput:
        return
    raise AssertionError("the errors were not found")


def best(run: Callable[[], object], runs: int = 3) -> float:
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--facts", type=int, default=100_000)
    parser.add_argument("--tokenizer", help="a directory with a tokenizer.json; adds the rows for tokens")
    options = parser.parse_args()
    facts = made_up(options.facts)
    wrong = [{**fact, "prompt": "was born in the city of"} for fact in facts]
    table = Table(title=f"{options.facts:,} facts", caption="best of three runs")
    for name in ("what", "file, MB", "seconds", "facts per second", "peak memory, MB"):
        table.add_column(name, justify="left" if name == "what" else "right")

    def row(what: str, run: Callable[[], object], size: float | None = None) -> None:
        seconds = best(run)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        megabytes = "" if size is None else f"{size / 2**20:.1f}"
        table.add_row(what, megabytes, f"{seconds:.2f}", f"{options.facts / seconds:,.0f}", f"{peak:,.0f}")

    with tempfile.TemporaryDirectory() as folder:
        for kind, write in (("csv", write_csv), ("jsonl", write_jsonl), ("yaml", write_yaml)):
            path = Path(folder) / f"facts.{kind}"
            write(path, facts)
            row(f"load and check, {kind}", lambda path=path: load_facts(path), path.stat().st_size)
        path = Path(folder) / "wrong.yaml"
        write_yaml(path, wrong)
        row("an error in every fact, yaml", lambda: refused(path), path.stat().st_size)
        file = load_facts(Path(folder) / "facts.jsonl")
    row("lint", lambda: lint(file))
    if options.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
        items = [(fact.prompt, fact.subject, fact.target, "") for fact in file.facts]
        row("tokenize", lambda: encode_many(tokenizer, items))
        row("lint with tokens", lambda: lint(file, tokenizer))
    Console().print(table)


if __name__ == "__main__":
    main()
