"""Seconds per value and per layer update: the fast path against the oracle, one fact at a time, in one process.

    python benchmarks/bench_memit.py MODEL --count 8 --oracle 1
    python benchmarks/bench_memit.py MODEL --counterfact counterfact.json --count 150

MODEL is any address. Values are not kept; the covariance comes from the cache or is collected first, outside of all
times but its own. Facts whose subject opens a text are left out: the oracle knows no such thing. The oracle's update
takes the fast path's values, so that both solve the same problem.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kpatch.edit.first_token import Part  # noqa: E402
from kpatch.edit.memit import Memit  # noqa: E402
from kpatch.edit.methods import DEFAULT_BUDGET, hyper_for  # noqa: E402
from kpatch.edit.requests import (  # noqa: E402
    Group,
    contexts_for,
    group_facts,
)
from kpatch.edit.solve import KeyCovariance  # noqa: E402
from kpatch.edit.upwards import Update, write_upwards  # noqa: E402
from kpatch.edit.values_cache import (  # noqa: E402
    find_values,
    plan,
)
from kpatch.facts.fact import Fact  # noqa: E402
from kpatch.facts.load import load_facts  # noqa: E402
from kpatch.models.address import resolve  # noqa: E402
from kpatch.models.model import Model, load_model  # noqa: E402
from kpatch.stats.covariance import collect  # noqa: E402
from kpatch.stats.moment import ridge_for  # noqa: E402
from tests.oracle import joint  # noqa: E402
from tests.oracle import memit as oracle  # noqa: E402

Result = TypeVar("Result")


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    begin = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def peak() -> str:
    text = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB"
    return text + (f" + {torch.cuda.max_memory_allocated() / 2**20:,.0f} MB GPU" if torch.cuda.is_available() else "")


def read_counterfact(path: Path) -> list[Fact]:
    """Facts from a list of flat records: prompt (with {}), subject, target_new, ground_truth."""
    return [
        Fact(row["subject"], row["prompt"], row["target_new"], was=row.get("ground_truth"))
        for row in json.loads(path.read_text(encoding="utf-8"))
    ]


def whole_groups(model: Model, facts: Sequence[Fact], contexts: Sequence[str], count: int) -> list[Group]:
    """The groups of the first `count` facts, without subjects that open a text."""
    groups = group_facts(model, facts[:count], contexts)
    opening = {group.subject for group in groups if group.first}
    if opening:
        print(f"left out, since they open a text: {', '.join(sorted(opening))}")
    return [group for group in groups if group.subject not in opening]


def prompts(facts: Sequence[Fact], group: Group) -> list[oracle.Prompt]:
    return [(facts[index].prompt, facts[index].subject, facts[index].target) for index in group.facts]


def line(what: str, seconds: float, each: int, more: str = "") -> None:
    print(f"  {what:44} {seconds / each:9.3f} s each {seconds:9.2f} s   {more}".rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--facts", type=Path, default=ROOT / "examples" / "news.yaml")
    parser.add_argument("--counterfact", type=Path, help="a JSON file of flat CounterFact records instead")
    parser.add_argument("--count", type=int, default=12, help="how many facts, from the head of the file")
    parser.add_argument("--oracle", type=int, default=2, help="how many of them the oracle does too; 0: none")
    parser.add_argument("--layers", help="first-last; without it the preset's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--corpus", default="self")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="let every fact take all its steps")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    model = load_model(resolve(options.model), device=options.device, dtype=options.dtype)
    ends = [int(end) for end in options.layers.split("-")] if options.layers else []
    layers = range(ends[0], ends[-1] + 1) if ends else None
    method = Memit()
    hyper = hyper_for(method, model, layers, dict(pair.split("=", 1) for pair in options.set))
    if options.full:
        hyper = replace(hyper, stop_loss=0.0)
    goal = method.objective(hyper)
    facts = read_counterfact(options.counterfact) if options.counterfact else list(load_facts(options.facts).facts)
    contexts = contexts_for(model, hyper.lead_ins, 0, 0, seed=0)
    groups = whole_groups(model, facts, contexts, options.count)
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"{model.name}, {model.precision}, {model.device}, {threads} threads, load {load:.1f}")
    print(f"{len(groups)} subjects, layers {hyper.layers}, {len(contexts)} contexts; {peak()} with the model loaded")

    seconds, covariance = timed(lambda: collect(model, hyper.layers, corpus=options.corpus, tokens=options.tokens))
    line(f"covariance, {covariance.tokens:,} tokens (or its cache)", seconds, len(hyper.layers), "a layer")
    replace(goal, steps=2).search(model, groups[:1])  # what only the first run does is not what is asked

    seconds, values = timed(lambda: find_values(model, groups, goal, budget=DEFAULT_BUDGET, keep=False))
    batches = len(plan(model, groups, goal.lowest))
    line(f"values, fast, {len(groups)} in {batches} batches", seconds, len(groups), f"{sum(values.steps)} steps")
    weight = model.mlp_width / hyper.leverage  # other subjects are left out: they only add to the mean
    seconds, preserved = timed(
        lambda: {
            layer: KeyCovariance.of(mean, weight, ridge_for(mean))
            for layer in hyper.layers
            for mean in [covariance.moments[layer].mean()]
        }
    )
    line("C factored", seconds, len(hyper.layers), "a layer")

    def update(some: list[Group], found: Tensor) -> Update:
        residual = method.residual(model, Part(tuple(some), hyper, False), found)
        return write_upwards(model, some, hyper.layers, residual, preserved.__getitem__, budget=DEFAULT_BUDGET // 2)

    seconds, _ = timed(lambda: update(groups, values.values))
    line(f"update, fast, {len(groups)}", seconds, len(hyper.layers), "a layer")
    print(f"  peak so far {peak()}")
    few = groups[: options.oracle]
    if not few:
        return

    fast, together = timed(lambda: goal.search(model, few))
    line(f"values, fast, {len(few)}", fast, len(few), f"{sum(together.steps)} steps")
    slow, found = timed(lambda: [joint.find_writes(model, contexts, prompts(facts, group), hyper) for group in few])
    bare = [oracle.rows_for(model, [""], prompts(facts, group)[:1])[0] for group in few]
    wanted = [joint.targets(model, row, deltas) for row, (deltas, _) in zip(bare, found, strict=True)]
    same = max(
        float((got[index] - target[layer].cpu()).norm() / deltas[layer].norm().clamp(min=1e-12))
        for got, target, (deltas, _) in zip(together.values, wanted, found, strict=True)
        for index, layer in enumerate(hyper.layers)
    )
    steps = sum(len(losses) for _, losses in found)
    line(f"values, oracle, {len(few)}", slow, len(few), f"{steps} steps; targets differ by {same:.1e}")
    per_fast, per_slow = fast / sum(together.steps), slow / steps
    print(f"  a step: fast {per_fast:.4f} s, oracle {per_slow:.4f} s, {per_slow / per_fast:.1f} times as long")

    fast, written = timed(lambda: update(few, together.values))
    line(f"update, fast, {len(few)}", fast, len(hyper.layers), "a layer")
    means: dict[int, Tensor] = {layer: covariance.moments[layer].mean() * weight for layer in hyper.layers}
    mine = [prompt for group in few for prompt in prompts(facts, group)]
    own = [dict(zip(hyper.layers, each.to(model.device), strict=True)) for each in together.values]
    slow, deltas = timed(lambda: joint.joint(model, contexts, mine, hyper, means, own))
    apart = max(_apart(written.deltas[name].dense(), delta, model) for name, delta in deltas.items())
    line(f"update, oracle, {len(few)}", slow, len(hyper.layers), f"a layer, {slow / fast:.1f} times as long")
    print(f"  deltas differ by {apart:.1e}; peak {peak()}")


def _apart(fast: Tensor, slow: Tensor, model: Model) -> float:
    slow = (slow.T if model.stores_transposed else slow).cpu()
    return float((fast.cpu() - slow).norm() / slow.norm())


if __name__ == "__main__":
    main()
