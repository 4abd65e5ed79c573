"""Does a filter of Δ spare ordinary text better than a smaller Δ does? One patch, cut down in several ways, one judge.

    python benchmarks/filters.py base/ counterfact.json --patch cf.patch --text wikitext.txt --limit 300

Ways, W = U S V^T by singular values, k the directions that hold a share of ‖W‖²:

    left    Δ − α U_k U_k^T Δ: less of what is put out along W's strongest outputs (REVIVE, SPHERE filter so)
    right   Δ − α Δ V_k V_k^T: less of what comes in along its strongest inputs
    scale   c Δ
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from quality import Judge, rates  # noqa: E402
from quality_questions import read  # noqa: E402

from kpatch.patch.format import read_patch  # noqa: E402

Cut = Callable[[Tensor, Tensor], Tensor]  # Δ and W in, what is left of Δ out; all [d, f]
COLUMNS = ("ES", "PS", "NS", "EA", "PA", "NA", "Score")
KINDS = ("edit", "paraphrase", "neighbor")


def strongest(weight: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """U_k [d, k] and V_k [f, k] of the directions of W [d, f] that hold `share` of ‖W‖²."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    held = s.square().cumsum(0) / s.square().sum()
    k = int((held < share).sum()) + 1
    return u[:, :k], vh[:k].T


def left(share: float, alpha: float) -> Cut:
    def cut(delta: Tensor, weight: Tensor) -> Tensor:
        u, _ = strongest(weight, share)
        return delta - alpha * u @ (u.T @ delta)

    return cut


def right(share: float, alpha: float) -> Cut:
    def cut(delta: Tensor, weight: Tensor) -> Tensor:
        _, v = strongest(weight, share)
        return delta - alpha * (delta @ v) @ v.T

    return cut


def scale(factor: float) -> Cut:
    return lambda delta, weight: factor * delta


WAYS: dict[str, Cut] = {
    "as it is": scale(1.0),
    "left, 20 %, α 1": left(0.2, 1.0),
    "left, 50 %, α ½": left(0.5, 0.5),
    "right, 20 %, α 1": right(0.2, 1.0),
    "scale 0.8": scale(0.8),
    "scale 0.65": scale(0.65),
}


@contextmanager
def cut_down(net: torch.nn.Module, deltas: Mapping[str, Tensor], cut: Cut, transposed: bool) -> Iterator[None]:
    """The network with what is left of each delta, in the orientation in which the weights are stored."""
    before = {name: net.get_parameter(name).detach().clone() for name in deltas}
    try:
        with torch.no_grad():
            for name, delta in deltas.items():
                weight = before[name].double()
                kept = cut(delta.T, weight.T).T if transposed else cut(delta, weight)
                net.get_parameter(name).add_(kept.to(before[name].dtype))
        yield
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                net.get_parameter(name).copy_(weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="the checkpoint without the patch")
    parser.add_argument("facts", type=Path)
    parser.add_argument("--patch", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="facts that are asked; the patch may have more")
    given = parser.parse_args()
    patch = read_patch(given.patch)
    first = next(iter(patch.deltas))
    deltas = {name: delta.dense().double() for name, delta in patch.deltas.items()}
    model, text = Judge.load(given.base), given.text.read_text(encoding="utf-8")
    print("| | " + " | ".join([*COLUMNS, "perplexity"]) + " |\n| --- |" + " ---: |" * (len(COLUMNS) + 1))
    for way, cut in WAYS.items():
        facts = read(given.facts, 0, given.limit, None)
        with cut_down(model.net, deltas, cut, patch.manifest.transposed(first)):
            judge = Judge(model.net, model.tokenizer)
            judge.score([question for fact in facts for question in fact if question.kind in KINDS])
            found = rates(facts, [range(len(facts))])[0]
            row = [f"{100 * value:.1f}" if (value := found[name]) is not None else "" for name in COLUMNS]
            print(f"| {way} | {' | '.join(row)} | {judge.perplexity(text):.2f} |", flush=True)


if __name__ == "__main__":
    main()
