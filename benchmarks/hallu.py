"""What a model takes up that it got wrong: HalluEditBench before and after MEMIT, ROME and FT-W.

    python benchmarks/hallu.py smollm2 hallu-editbench.csv -o hallu/ --records 100

The file is one of HalluEditBench's tables (Huang et al. 2024). Its first records whose question the unedited model
answers wrongly, in the form in which it is asked (chat where it has a template), are edited with each method. A
neighbor's own answer is what the unedited model says to the locality question. Every method leaves OUT/METHOD.json,
and what is there is not done again. docs/metrics.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from kept_results import measured_once, percent  # noqa: E402

from kpatch.cache import atomic_write_text  # noqa: E402
from kpatch.edit.make import make  # noqa: E402
from kpatch.evaluate.answers import ANSWER_TOKENS, ask, first_words  # noqa: E402
from kpatch.evaluate.assess import Wanted, assess  # noqa: E402
from kpatch.evaluate.closed_book import answer_questions, form_for  # noqa: E402
from kpatch.evaluate.forms import ask_forms, prepare  # noqa: E402
from kpatch.evaluate.patched import patched  # noqa: E402
from kpatch.facts.fact import Fact, Neighbor  # noqa: E402
from kpatch.facts.importers.read import import_facts  # noqa: E402
from kpatch.facts.question_files import Question  # noqa: E402
from kpatch.facts.questions import plainly  # noqa: E402
from kpatch.models.model import Model, open_model  # noqa: E402

METHODS = ("memit", "rome", "ft-paper")  # FT-W of the MEMIT paper is a preset file of ft; any method may be named
_AT_ONCE = 50  # questions asked before it is seen whether enough were answered wrongly
COLUMNS = ("chat", "question", "rephrased", "locality", "choice", "yes/no", "reversed", "hops")


def wrong_ones(model: Model, facts: Sequence[Fact], count: int) -> list[Fact]:
    """The first `count` facts whose target the model does not name when it is asked their question."""
    form, found = form_for(model), []
    for begin in range(0, len(facts), _AT_ONCE):
        some = facts[begin : begin + _AT_ONCE]
        questions = [Question(fact.text(), (fact.target,)) for fact in some]
        for fact, answered in zip(some, answer_questions(model, questions, form), strict=True):
            if not answered.recalled:
                found.append(fact)
        if len(found) >= count:
            break
    return found[:count]


def with_own_answers(model: Model, facts: Sequence[Fact]) -> list[Fact]:
    """The facts with the model's own short answers to their locality questions; empty answers stay unknown."""
    texts = [plainly(neighbor.prompt) for fact in facts for neighbor in fact.neighbors]
    answers = iter(ask(model, texts, max_tokens=ANSWER_TOKENS) if texts else [])
    return [
        replace(
            fact,
            neighbors=tuple(
                Neighbor(neighbor.prompt, first_words(next(answers).completion) or None) for neighbor in fact.neighbors
            ),
        )
        for fact in facts
    ]


def row(model: Model, facts: Sequence[Fact], seed: int) -> dict[str, Any]:
    """Rate, interval and n of each column for the model as it is; without a chat template there is none for chat."""
    form = form_for(model)
    asked = ("question", "chat") if form == "chat" else ("question",)
    found = assess(model, facts, Wanted(forms=asked, consequences=True, seed=seed))
    forms, follows = found.asked["forms"], found.asked["consequences"]
    rephrased = [
        replace(fact, question=text, neighbors=())
        for fact in facts
        for text in fact.paraphrases
        if fact.subject.casefold() in text.casefold()
    ]
    again = ask_forms(model, rephrased, prepare(model, rephrased, asked[-1:]), seed=seed).rates[asked[-1]]
    parts = {name: rates["edits"] for name, rates in forms.items()}
    parts |= {"rephrased": again["edits"], "locality": forms["question"]["neighbors"]}
    cells = {name: (part["named"], part["named_interval"], part["n"]) for name, part in parts.items()}
    for kind in ("choice", "yes_no", "reversed", "hops"):
        part = follows[kind]
        cells[kind.replace("_", "/")] = (part["rate"], part["interval"], part["n"])
    return cells


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A row for each method: percent with the 95 % interval; n stands in the headers."""
    first = next(iter(rows.values()))
    columns = [name for name in COLUMNS if name in first]
    headers = " | ".join(f"{name} ({first[name][2]})" for name in columns)
    lines = [f"| | {headers} |", "| --- " * (len(columns) + 1) + "|"]
    for name, cells in rows.items():
        lines.append("| " + " | ".join([name, *(percent(*cells[column][:2]) for column in columns)]) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("records_file", type=Path, metavar="CSV")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the folder for results")
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    model = open_model(options.model)
    every = import_facts(options.records_file, "hallu", drop_conflicts=True).facts
    facts = with_own_answers(model, wrong_ones(model, every, options.records))
    print(f"{model.name}: {len(facts)} records answered wrongly in the {form_for(model)} form", flush=True)
    rows: dict[str, dict[str, Any]] = {}
    for method in ("unedited", *options.methods.split(",")):

        def measure(method: str = method) -> dict[str, Any]:
            if method == "unedited":
                return row(model, facts, options.seed)
            path, file = options.out / f"{method}.patch", HERE / "presets" / f"{method}.yaml"
            way: dict[str, Any] = {"preset": file} if file.is_file() else {"method": method}
            make(facts, out=path, model=model, seed=options.seed, force=True, **way)
            with patched(model, path):
                return row(model, facts, options.seed)

        rows[method] = measured_once(options.out / f"{method}.json", measure)
    text = table(rows)
    atomic_write_text(options.out / "table.md", text)
    print(f"\n{text}")


if __name__ == "__main__":
    main()
