"""Score and its parts against the number of edits, method by method: figure 1b and table 2 of the paper.

    python benchmarks/scaling.py smollm2 counterfact.json -o scaling/
    python benchmarks/scaling.py smollm2 counterfact.json -o scaling/ --methods memit,ft --counts 1,10,100 --generate

The file is any that `kpatch import` reads; facts that contradict earlier ones are left out, and n edits are its first
n. Every (method, n) leaves OUT/METHOD-N.json, and what is there is not done again, so a run that was stopped goes on;
ROME, whose n edits are the first n of a longer run, also goes on inside one. OUT/table.md and OUT/scaling.png are
made of all results there are. Seconds per edit are those of finding values and of the update, without the covariance.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kpatch.cache import atomic_write  # noqa: E402
from kpatch.edit.make import make  # noqa: E402
from kpatch.edit.methods import hyper_for, method_named  # noqa: E402
from kpatch.edit.presets import PRESETS  # noqa: E402
from kpatch.edit.rome import Edited, Running, edit, rome_contexts  # noqa: E402
from kpatch.edit.solve import key_covariance  # noqa: E402
from kpatch.edit.weights import restored  # noqa: E402
from kpatch.evaluate.assess import Wanted, assess  # noqa: E402
from kpatch.evaluate.patched import patched  # noqa: E402
from kpatch.facts.fact import Fact  # noqa: E402
from kpatch.facts.importers.read import import_facts  # noqa: E402
from kpatch.models.address import resolve  # noqa: E402
from kpatch.models.model import Model, load_model  # noqa: E402
from kpatch.stats.covariance import collect  # noqa: E402

COUNTS = (1, 3, 10, 32, 100, 316, 1000)
METHODS = ("unpatched", "memit", "memit-paper", "rome", "ft", "ft-paper", "alphaedit", "blue")
FT_PAPER = ROOT / "benchmarks" / "presets" / "ft-paper.yaml"
PARTS = ("efficacy", "generalization", "specificity")
_SAVE = 10  # edits of ROME between saves


class Study:
    """One output folder: what is there, what is to do, and how it is measured."""

    def __init__(self, out: Path, model: Model, facts: Sequence[Fact], options: argparse.Namespace) -> None:
        self.out, self.model, self.facts, self.options = out, model, facts, options
        self.wanted = Wanted(generate=options.generate, seed=options.seed)

    def todo(self, method: str, counts: Sequence[int]) -> list[int]:
        return [n for n in counts if n <= len(self.facts) and not (self.out / f"{method}-{n}.json").exists()]

    def measure(self, method: str, n: int, seconds: float) -> None:
        """Measure the model as it is now, and keep what was found."""
        begin = time.monotonic()
        found = assess(self.model, self.facts[:n], self.wanted)
        result = {
            "method": method,
            "n": n,
            "model": self.model.name,
            "metrics": found.metrics,
            **found.writing,
            "seconds": seconds,
            "seconds_per_edit": seconds / n,
            "seconds_of_measuring": time.monotonic() - begin,
            "threads": torch.get_num_threads(),
            "device": str(self.model.device),
            "load": os.getloadavg()[0],
        }
        atomic_write(self.out / f"{method}-{n}.json", lambda path: _write(path, json.dumps(result, indent=2) + "\n"))
        score = found.metrics["score"]
        shown = "" if score is None else f"Score {100 * score:.1f}, "
        print(f"{method} n = {n}: {shown}{seconds / n:.2f} s per edit", flush=True)

    def unpatched(self, counts: Sequence[int]) -> None:
        for n in self.todo("unpatched", counts):
            self.measure("unpatched", n, 0.0)

    def made(self, method: str, counts: Sequence[int]) -> None:
        """Methods that take all facts at once: one patch for every n."""
        for n in self.todo(method, counts):
            path = self.out / f"{method}-{n}.patch"
            done = make(
                self.facts[:n],
                out=path,
                model=self.model,
                method="ft" if method == "ft-paper" else method,
                preset=FT_PAPER if method == "ft-paper" else None,
                settings=settings(self.options, method),
                resume=False,
                seed=self.options.seed,
                force=True,
            )
            with patched(self.model, path):
                self.measure(method, n, done.edit_seconds)
            if not self.options.keep:
                path.unlink()

    def rome(self, counts: Sequence[int]) -> None:
        """ROME edits one fact after another, so one run passes through every n."""
        todo = self.todo("rome", counts)
        if not todo:
            return
        hyper = hyper_for(method_named("rome"), self.model, None, settings(self.options, "rome"))
        contexts = rome_contexts(self.model, hyper, self.options.seed)
        texts = collect(self.model, hyper.layers, seed=self.options.seed)
        preserved = key_covariance(hyper.layer, texts.moments[hyper.layer].mean(), 1.0)
        kept = self.out / "rome-edits.safetensors"
        edits, seconds = _read_edits(kept)
        with restored(self.model, [self.model.weight_name(hyper.layer)]):
            running = Running(self.model, hyper.layer)
            for number in range(1, max(todo) + 1):
                if number > len(edits):
                    begin = time.monotonic()
                    edits.append(edit(self.model, self.facts[number - 1], hyper, contexts, preserved))
                    running.add(edits[-1])
                    seconds.append(time.monotonic() - begin)
                    if number % _SAVE == 0 or number in todo:
                        _write_edits(kept, edits, seconds)
                else:
                    running.add(edits[number - 1])
                if number in todo:
                    self.measure("rome", number, sum(seconds[:number]))


def settings(options: argparse.Namespace, method: str) -> dict[str, str]:
    """--set METHOD.key=value for one method."""
    pairs = (pair.split("=", 1) for pair in options.set)
    return {key.split(".", 1)[1]: value for key, value in pairs if key.split(".", 1)[0] == method}


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write_edits(path: Path, edits: Sequence[Edited], seconds: Sequence[float]) -> None:
    tensors = {
        "keys": torch.stack([one.key for one in edits]),
        "values": torch.stack([one.value for one in edits]),
        "left": torch.cat([one.left for one in edits], dim=1).contiguous(),
        "right": torch.cat([one.right for one in edits]),
        "seconds": torch.tensor(list(seconds), dtype=torch.float64),
    }
    atomic_write(path, lambda temporary: save_file(tensors, temporary))


def _read_edits(path: Path) -> tuple[list[Edited], list[float]]:
    if not path.exists():
        return [], []
    found = load_file(path)
    edits = [
        Edited(key, value, left[:, None], right[None])
        for key, value, left, right in zip(
            found["keys"], found["values"], found["left"].T, found["right"], strict=True
        )
    ]
    return edits, found["seconds"].tolist()


# What is made of the results


def results(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in out.glob("*-*.json")]
    return sorted(found, key=lambda one: (METHODS.index(one["method"]), one["n"]))


def table(found: Sequence[dict[str, Any]]) -> str:
    """The paper's table 2, a row for every method and n: percent with half the 95 % interval's width."""
    writes = any("fluency" in one for one in found)
    headers = ["n", "method", "Score", "Efficacy", "Generalization", "Specificity"]
    headers += ["Fluency", "Consistency"] * writes
    headers.append("s per edit")
    lines = ["| " + " | ".join(headers) + " |", "|" + " ---: |" * len(headers)]
    for one in sorted(found, key=lambda one: (one["n"], METHODS.index(one["method"]))):
        metrics = one["metrics"]
        cells = [str(one["n"]), one["method"], _cell(metrics["score"], metrics["score_interval"])]
        cells += [
            _cell(metrics[part]["success"], metrics[part]["interval"]) if metrics[part] else "–" for part in PARTS
        ]
        if writes:
            cells += ["–" if one.get(name) is None else f"{one[name]:.3f}" for name in ("fluency", "consistency")]
        cells.append(f"{one['seconds_per_edit']:.2f}" if one["method"] != "unpatched" else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}" + ("" if interval is None else f" ({50 * (interval[1] - interval[0]):.1f})")


def plot(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Score and its parts against n, with their intervals: the paper's figure 1b."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(14, 3.6), sharey=True, layout="constrained")
    for axis, (title, name) in zip(
        axes, [("Score", "score"), *((part.capitalize(), part) for part in PARTS)], strict=True
    ):
        for method in METHODS:
            points = []
            for one in found:
                metrics = one["metrics"]
                value = metrics["score"] if name == "score" else (metrics[name] or {}).get("success")
                pair = metrics["score_interval"] if name == "score" else (metrics[name] or {}).get("interval")
                if one["method"] == method and value is not None:
                    points.append((one["n"], 100 * value, *(100 * end for end in pair or (value, value))))
            if points:
                n, middle, low, high = zip(*points, strict=True)
                (line,) = axis.plot(n, middle, marker="o", markersize=3, label=method)
                axis.fill_between(n, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
        axis.set(title=title, xscale="log", xlabel="edits", ylim=(-2, 102))
        counts = sorted({one["n"] for one in found})
        axis.set_xticks(counts, map(str, counts))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("facts", type=Path, help="CounterFact, in any form that `kpatch import` reads")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the folder for results")
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--set", action="append", default=[], metavar="METHOD.KEY=VALUE")
    parser.add_argument("--generate", action="store_true", help="measure fluency and consistency too")
    parser.add_argument("--keep", action="store_true", help="keep the patches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    counts, methods = [int(n) for n in options.counts.split(",")], options.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"unknown methods {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    assert set(PRESETS) - {"mend"} | {"unpatched", "ft-paper"} == set(METHODS)  # mend has benchmarks/mend.py

    options.out.mkdir(parents=True, exist_ok=True)
    facts = import_facts(options.facts, drop_conflicts=True).facts
    model = load_model(resolve(options.model), device=options.device, dtype=options.dtype)
    print(f"{model.name}, {model.dtype}, {model.device}, {torch.get_num_threads()} threads, {len(facts):,} facts")
    study = Study(options.out, model, facts, options)
    for method in methods:
        if method == "unpatched":
            study.unpatched(counts)
        elif method == "rome":
            study.rome(counts)
        else:
            study.made(method, counts)
    found = results(options.out)
    text = table(found)
    _write(options.out / "table.md", text)
    plot(found, options.out / "scaling.png")
    print(f"\n{text}\n{options.out / 'table.md'}, {options.out / 'scaling.png'}")


if __name__ == "__main__":
    main()
