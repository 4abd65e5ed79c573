"""Facts in several patches made apart: applied together, added up plainly, and as one patch.

    python benchmarks/stacking.py smollm2 benchmarks/facts/tuning.yaml -o stacking/ --parts 5 --limit 25 --set chat=0

Fact i goes into patch i modulo the number of parts. Every way leaves OUT/WAY.json, and what is there is not done
again; OUT/table.md is made of all of them. The ways:

    unpatched  the model itself
    plain      W + Σ Δ as the files hold them
    together   what `kpatch apply` of all of them gives: their joint solution, without the model
    resolved   what `kpatch stack --resolve` gives: solved again on the model
    joint      one patch of all facts
    chain      each made `--on` those before it
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kpatch.checkpoint.apply import apply  # noqa: E402
from kpatch.edit.make import make  # noqa: E402
from kpatch.edit.resolve import solve_again  # noqa: E402
from kpatch.evaluate.assess import Wanted, assess  # noqa: E402
from kpatch.evaluate.patched import patched  # noqa: E402
from kpatch.facts.fact import Fact  # noqa: E402
from kpatch.facts.load import load_facts  # noqa: E402
from kpatch.models.address import resolve  # noqa: E402
from kpatch.models.model import Model, load_model  # noqa: E402
from kpatch.patch.delta import Delta, total  # noqa: E402
from kpatch.patch.format import read_patch  # noqa: E402

WAYS = ("unpatched", "plain", "together", "resolved", "joint", "chain")
PARTS = ("efficacy", "generalization", "specificity")


class Study:
    """One output folder, the model, and the facts dealt out to `parts` patches."""

    def __init__(self, model: Model, facts: Sequence[Fact], options: argparse.Namespace) -> None:
        self.model, self.facts, self.options, self.out = model, facts, options, options.out
        self.settings = dict(pair.split("=", 1) for pair in options.set)
        self.dealt = [facts[number :: options.parts] for number in range(options.parts)]

    def patches(self, name: str = "part", on: Path | None = None) -> list[Path]:
        """The patches of the parts; with `on`, each made for what that directory then carries, and applied to it."""
        paths = []
        for number, some in enumerate(self.dealt):
            path = self.out / f"{name}-{number}.patch"
            if not path.exists():
                model = {"model": self.model} if on is None else {"on": on}
                make(some, out=path, settings=self.settings, seed=self.options.seed, **model)
                if on is not None:
                    apply([path], on)
            paths.append(path)
        return paths

    def measure(self, way: str, seconds: float, model: Model | None = None) -> None:
        found = assess(model or self.model, self.facts, Wanted(seed=self.options.seed))
        about = {"way": way, "facts": len(self.facts), "parts": len(self.dealt), "seconds": seconds}
        (self.out / f"{way}.json").write_text(json.dumps({**about, "metrics": found.metrics}, indent=2) + "\n")

    def unpatched(self) -> None:
        self.measure("unpatched", 0.0)

    def plain(self) -> None:
        read = [read_patch(path) for path in self.patches()]
        begin = time.monotonic()
        names = sorted({name for patch in read for name in patch.deltas})
        deltas: dict[str, Delta] = {
            name: total([patch.deltas[name] for patch in read if name in patch.deltas]) for name in names
        }
        with patched(self.model, deltas):
            self.measure("plain", time.monotonic() - begin)

    def together(self) -> None:
        paths = self.patches()
        begin = time.monotonic()
        with ExitStack() as stack:
            for path in paths:
                stack.enter_context(patched(self.model, path))
            self.measure("together", time.monotonic() - begin)

    def resolved(self) -> None:
        path, paths = self.out / "resolved.patch", self.patches()
        begin = time.monotonic()
        solve_again(paths, path, model=self.model, force=True)
        self._one("resolved", path, begin)

    def joint(self) -> None:
        path, begin = self.out / "joint.patch", time.monotonic()
        make(self.facts, out=path, model=self.model, settings=self.settings, seed=self.options.seed, force=True)
        self._one("joint", path, begin)

    def _one(self, way: str, path: Path, begin: float) -> None:
        seconds = time.monotonic() - begin
        with patched(self.model, path):
            self.measure(way, seconds)

    def chain(self) -> None:
        directory, begin = self.out / "model", time.monotonic()
        assert self.model.path is not None
        if not directory.exists():
            shutil.copytree(self.model.path, directory)
        self.patches("chain", directory)
        seconds = time.monotonic() - begin
        carrying = load_model(resolve(str(directory)), device=self.options.device, dtype=self.options.dtype)
        self.measure("chain", seconds, carrying)


def table(out: Path) -> str:
    """A row for every way that was measured: percent with half the 95 % interval's width."""
    found = [json.loads((out / f"{way}.json").read_text()) for way in WAYS if (out / f"{way}.json").exists()]
    headers = ("Way", "Score", *(part.capitalize() for part in PARTS), "As first choice")
    lines = ["| " + " | ".join(headers) + " |", "| --- |" + " ---: |" * (len(headers) - 1)]
    for one in found:
        metrics = one["metrics"]
        cells = [one["way"], _cell(metrics["score"], metrics["score_interval"])]
        cells += [_cell(metrics[part]["success"], metrics[part]["interval"]) for part in PARTS]
        lines.append("| " + " | ".join([*cells, f"{100 * metrics['efficacy']['accuracy']:.1f}"]) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}" + ("" if interval is None else f" ({50 * (interval[1] - interval[0]):.1f})")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("facts", type=Path, help="a fact file")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the folder for results")
    parser.add_argument("--parts", type=int, default=5)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args(arguments)
    ways = options.ways.split(",")
    if unknown := set(ways) - set(WAYS):
        parser.error(f"unknown ways {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    facts = load_facts(options.facts).facts[: options.limit]
    model = load_model(resolve(options.model), device=options.device, dtype=options.dtype)
    print(f"{model.name}, {model.dtype}, {torch.get_num_threads()} threads, {len(facts):,} facts", flush=True)
    study = Study(model, facts, options)
    steps: dict[str, Callable[[], Any]] = {way: getattr(study, way) for way in WAYS}
    for way in ways:
        if not (options.out / f"{way}.json").exists():
            steps[way]()
            print(f"{way}: done", flush=True)
    (options.out / "table.md").write_text(table(options.out))
    print(f"\n{table(options.out)}")


if __name__ == "__main__":
    main()
