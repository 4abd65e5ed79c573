"""Every method side by side on the same facts: one run, one model in memory, one judge, with 95 % intervals.

    python benchmarks/methods.py smollm2 benchmarks/facts/tuning.yaml -n 20 -o methods/
    python benchmarks/methods.py smollm2 counterfact.json -n 100 -o methods/ --methods memit,ft --set memit.chat=0

The file is a fact file, or any data set that `kpatch import` reads. Each method makes a patch of the first n facts,
and the judge of benchmarks/quality.py, which knows nothing of kpatch, asks the model with the patch in memory. Every
method leaves OUT/METHOD.json, and what is there is not done again; OUT/table.md is made of all results there are.
`ft-paper` is `--method ft` with benchmarks/presets/ft-paper.yaml.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from quality import Judge, intervals, rates  # noqa: E402
from quality_questions import Question, fact_file  # noqa: E402

from kpatch.cache import atomic_write  # noqa: E402
from kpatch.edit.make import make  # noqa: E402
from kpatch.errors import KpatchError  # noqa: E402
from kpatch.evaluate.patched import patched  # noqa: E402
from kpatch.facts.fact import Fact  # noqa: E402
from kpatch.facts.importers.read import import_facts  # noqa: E402
from kpatch.facts.load import load_facts  # noqa: E402
from kpatch.models.address import resolve  # noqa: E402
from kpatch.models.model import Model, load_model  # noqa: E402

FT_PAPER = HERE / "presets" / "ft-paper.yaml"
METHODS = ("unpatched", "memit", "memit-paper", "rome", "ft", "ft-paper", "alphaedit", "blue")
COLUMNS = ("Score", "ES", "PS", "NS", "EA", "PA", "NA", "PF", "NF")
WRITTEN = {"paraphrase": 12, "neighbor": 8}  # tokens the model writes by itself


def read(path: Path, count: int) -> tuple[Fact, ...]:
    """The first facts of a fact file or a data set, without contradictions. Raises ValueError for too few."""
    if path.suffix in (".yaml", ".yml"):
        facts = load_facts(path).facts
    else:
        facts = import_facts(path, drop_conflicts=True).facts
    if not 0 < count <= len(facts):
        raise ValueError(f"{path} holds {len(facts)} facts, and {count} were asked for")
    return tuple(facts[:count])


def questions(facts: Sequence[Fact]) -> list[list[Question]]:
    """What each fact is judged by: its prompt, its paraphrases and its neighbors."""
    asked = []
    for number, fact in enumerate(facts):
        record = fact.to_dict()
        if "space" in record:
            record["space"] = str(record["space"]).lower()
        asked.append(fact_file(number, record, {}))
    return asked


def judged(model: Model, facts: Sequence[Fact]) -> dict[str, Any]:
    """Every rate and its interval, of the model as it is now."""
    asked = questions(facts)
    judge = Judge(model.net, model.tokenizer)
    by_kind = {kind: [q for fact in asked for q in fact if q.kind == kind] for kind in ("edit", *WRITTEN)}
    judge.score([q for some in by_kind.values() for q in some])
    for kind, tokens in WRITTEN.items():
        judge.write(by_kind[kind], tokens)
    return {"metrics": rates(asked, [range(len(asked))])[0], "intervals": intervals(asked)}


def run(method: str, model: Model, facts: Sequence[Fact], options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table: the patch is made, held in memory while the judge asks, and kept with `--keep`."""
    result: dict[str, Any] = {"method": method, "n": len(facts), "model": model.name, "seconds_per_fact": None}
    if method == "unpatched":
        return result | judged(model, facts)
    path = options.out / f"{method}.patch"
    layers = dict(pair.split("=", 1) for pair in options.layers).get(method)
    pairs = (pair.split("=", 1) for pair in options.set)
    made = make(
        facts,
        out=path,
        model=model,
        method="ft" if method == "ft-paper" else method,
        preset=FT_PAPER if method == "ft-paper" else None,
        layers=None if layers is None else [int(layer) for layer in layers.split(",")],
        settings={key.split(".", 1)[1]: value for key, value in pairs if key.split(".", 1)[0] == method},
        resume=options.resume,
        seed=options.seed,
        force=True,
    )
    with patched(model, path):
        result |= judged(model, facts)
    if not options.keep:
        path.unlink()
    result["layers"] = list(made.layers)
    result["seconds_per_fact"] = made.edit_seconds / len(facts)
    return result


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each method, in per cent; behind a success rate the ends of its 95 % interval."""
    lines = ["| " + " | ".join(["method", *COLUMNS, "s a fact"]) + " |"]
    lines.append("| --- |" + " ---: |" * (len(COLUMNS) + 1))
    for one in found:
        cells = [one["method"]]
        for name in COLUMNS:
            value, between = one["metrics"][name], one["intervals"][name]
            ends = (
                ""
                if name in ("EA", "PA", "NA", "PF", "NF") or not between
                else " ({:.0f} to {:.0f})".format(*(100 * end for end in between))
            )
            cells.append("" if value is None else f"{100 * value:.1f}{ends}")
        seconds = one["seconds_per_fact"]
        lines.append("| " + " | ".join([*cells, "" if seconds is None else f"{seconds:.1f}"]) + " |")
    return "\n".join(lines) + "\n"


def results(out: Path) -> list[dict[str, Any]]:
    """What is there, in the order of METHODS."""
    paths = (out / f"{method}.json" for method in METHODS)
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("facts", type=Path, help="fact file (.yaml), or a data set that `kpatch import` reads")
    parser.add_argument("-n", "--count", type=int, default=20, help="how many facts, from the first on")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the folder for results")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--set", action="append", default=[], metavar="METHOD.KEY=VALUE")
    parser.add_argument("--layers", action="append", default=[], metavar="METHOD=LAYERS", help="as in memit=4,5,6")
    parser.add_argument("--resume", action="store_true", help="take values from the cache; times then mean little")
    parser.add_argument("--keep", action="store_true", help="keep the patches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args(arguments)
    methods = options.methods.split(",")
    if unknown := sorted(set(methods) - set(METHODS)):
        parser.error(f"unknown methods {', '.join(unknown)}; there are {', '.join(METHODS)}")
    try:
        facts = read(options.facts, options.count)
        options.out.mkdir(parents=True, exist_ok=True)
        model = load_model(resolve(options.model), device=options.device, dtype=options.dtype)
        print(f"{model.name}, {model.dtype}, {model.device}, {torch.get_num_threads()} threads, {len(facts)} facts")
        for method in methods:
            path = options.out / f"{method}.json"
            if not path.is_file():
                text = json.dumps(run(method, model, facts, options), indent=1) + "\n"
                atomic_write(path, lambda temporary, text=text: _write(temporary, text))
            print(f"{method}: done", flush=True)
    except (KpatchError, OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    text = table(results(options.out))
    _write(options.out / "table.md", text)
    print(f"\n{text}")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
