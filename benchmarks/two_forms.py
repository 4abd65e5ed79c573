"""Edited in one form, asked in the other: facts learned as statements, as questions in chat, as both, and
with the question as their prompt (`asking`).

    python benchmarks/two_forms.py smollm2 benchmarks/facts/tuning.yaml -o forms/ --limit 12

The model writes by itself until it stops, 64 tokens at most; docs/metrics.md says which answers count. Facts that have
no question are left out. Every way of editing leaves OUT/NAME.json, and what is there is not done again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from kept_results import measured_once, percent  # noqa: E402

from kpatch.cache import atomic_write_text  # noqa: E402
from kpatch.edit.make import make  # noqa: E402
from kpatch.evaluate.forms import ask_forms, prepare  # noqa: E402
from kpatch.evaluate.patched import patched  # noqa: E402
from kpatch.facts.load import load_facts  # noqa: E402
from kpatch.facts.questions import FORMS, question_of  # noqa: E402
from kpatch.models.model import open_model  # noqa: E402

# The setting `chat` of each; `asking` has the question in place of the prompt as well
EDITED = {"unedited": None, "statements": "0", "questions": "2", "both": "1", "asking": "1"}


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each way of editing; edits and neighbors in each form, percent with the 95 % interval."""
    first = next(iter(found.values()))
    columns = [(side, form) for side in ("edits", "neighbors") for form in first]
    headers = [f"{side}, {form} ({first[form][side]['n']})" for side, form in columns]
    lines = ["| edited as | " + " | ".join(headers) + " |", "| --- " * (len(columns) + 1) + "|"]
    for name, rates in found.items():
        cells = [percent(rates[form][side]["named"], rates[form][side]["named_interval"]) for side, form in columns]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("facts", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the folder for results")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="settings of every edit")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    model = open_model(options.model)
    facts = [fact for fact in load_facts(options.facts).facts if question_of(fact)][: options.limit]
    asking = [replace(fact, prompt=question_of(fact) or fact.prompt) for fact in facts]
    prepared = prepare(model, facts, FORMS)
    settings = dict(pair.split("=", 1) for pair in options.set)
    found: dict[str, Any] = {}
    for name, chat in EDITED.items():

        def measure(path: Path = options.out / f"{name}.patch", chat: str | None = chat) -> Any:
            if chat is None:
                return ask_forms(model, facts, prepared, seed=options.seed).rates
            learned = asking if path.stem == "asking" else facts
            make(learned, out=path, model=model, settings={**settings, "chat": chat}, seed=options.seed, force=True)
            with patched(model, path):
                return ask_forms(model, facts, prepared, seed=options.seed).rates

        found[name] = measured_once(options.out / f"{name}.json", measure)
    text = table(found)
    atomic_write_text(options.out / "table.md", text)
    print(f"\n{text}")


if __name__ == "__main__":
    main()
