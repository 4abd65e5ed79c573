"""At what size a patch breaks a model: perplexity of a text against the size of Δ, by several gauges of that size.

    python benchmarks/breaking.py smollm2 patches/news.patch -o breaking/ --text docs/memit.md

Each patch is entered at several scales: as it is, with one of its layers alone (the middle one), and as random
factors of the same layers, ranks and relative norms, whole and in that layer alone. Then it says at what size, by each
gauge, perplexity has risen by 5 and by 50 percent, on a straight line through the logarithms of scale and rise. The
gauge to trust is the one whose sizes lie closest together.

    largest      max over the layers of ‖Δ‖_F / ‖W‖_F       spectral  the same with ‖·‖₂
    sum          Σ over the layers of ‖Δ‖_F / ‖W‖_F         squares   √ Σ (‖Δ‖_F / ‖W‖_F)²
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kpatch.evaluate.patched import patched  # noqa: E402
from kpatch.evaluate.perplexity import perplexity, text_rows  # noqa: E402
from kpatch.models.address import resolve  # noqa: E402
from kpatch.models.model import Model, load_model  # noqa: E402
from kpatch.patch.delta import Delta, LowRank  # noqa: E402
from kpatch.patch.format import read_patch  # noqa: E402

RISES = (0.05, 0.5)


def random_like(delta: Delta, seed: int) -> LowRank:
    """Random factors with the shape, rank and norm of a delta."""
    draw = torch.Generator().manual_seed(seed)
    (rows, cols), rank = delta.shape, delta.rank or min(delta.shape)
    found = LowRank(torch.randn(rows, rank, generator=draw), torch.randn(rank, cols, generator=draw))
    return found.scaled(delta.norm() / found.norm())


def gauges(deltas: Mapping[str, Delta], norms: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The size of a set of deltas by each gauge; `norms` are the Frobenius and the spectral norm of each weight."""
    shares = [delta.norm() / norms[name][0] for name, delta in deltas.items()]
    tops = []
    for name, delta in deltas.items():
        s = delta.svd()[1] if isinstance(delta, LowRank) else torch.linalg.svdvals(delta.delta.double())
        tops.append(float(s[0]) / norms[name][1])
    squares = math.sqrt(sum(share**2 for share in shares))
    return {"largest": max(shares), "spectral": max(tops), "sum": sum(shares), "squares": squares}


def variants(path: Path, seed: int) -> dict[str, dict[str, Delta]]:
    """A patch's deltas as they are, of one layer, and random ones in their place."""
    deltas = {name: delta for name, delta in read_patch(path).deltas.items()}
    noise: dict[str, Delta] = {name: random_like(delta, seed + n) for n, (name, delta) in enumerate(deltas.items())}
    middle = list(deltas)[len(deltas) // 2]
    return {
        path.stem: deltas,
        f"{path.stem}, random": noise,
        f"{path.stem}, one layer": {middle: deltas[middle]},
        f"{path.stem}, random, one layer": {middle: noise[middle]},
    }


def curve(
    model: Model, deltas: Mapping[str, Delta], rows: list[list[int]], before: float, start: float
) -> list[tuple[float, float]]:
    """(scale, relative rise of perplexity): scales doubled from `start`, then one halfway below each of RISES."""
    points: dict[float, float] = {}

    def measure(scale: float) -> float:
        with patched(model, {name: delta.scaled(scale) for name, delta in deltas.items()}):
            points[scale] = perplexity(model, rows) / before - 1
        print(f"    × {scale:.3g}: {points[scale]:+.1%}", flush=True)
        return points[scale]

    scale = start
    while measure(scale) > RISES[0] and len(points) < 8:
        scale /= 2
    scale = max(points)
    while points[scale] < RISES[-1] and len(points) < 12:
        scale *= 2
        measure(scale)
    for wanted in RISES:
        between = min(scale for scale in points if points[scale] >= wanted) / math.sqrt(2)
        if not any(math.isclose(between, scale) for scale in points):
            measure(between)
    return sorted(points.items())


def crossing(points: list[tuple[float, float]], wanted: float) -> float | None:
    """The scale at which the rise is `wanted`, by a line through the nearest point on each side, or two on one."""
    able = [(math.log(scale), math.log(rise)) for scale, rise in points if rise > 0]
    if len(able) < 2:
        return None
    at = sum(rise < math.log(wanted) for _, rise in able)
    first = min(max(at - 1, 0), len(able) - 2)
    (low, under), (high, over) = able[first : first + 2]
    return math.exp(low + (high - low) * (math.log(wanted) - under) / (over - under))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("patches", nargs="+", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--start", type=float, default=0.4, help="first size tried, by the gauge `squares`")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = load_model(resolve(options.model))
    rows = text_rows(model, [path.read_text() for path in options.text], options.tokens)
    before = perplexity(model, rows)
    print(f"perplexity before: {before:.2f} on {sum(map(len, rows))} tokens", flush=True)
    norms: dict[str, tuple[float, float]] = {}
    table = []
    for path in options.patches:
        for name, deltas in variants(path, options.seed).items():
            for weight in deltas.keys() - norms.keys():
                w = model.numbers(weight).float()
                norms[weight] = (float(w.norm()), float(torch.linalg.matrix_norm(w, 2)))
            size = gauges(deltas, norms)
            print(name, {gauge: round(value, 4) for gauge, value in size.items()}, flush=True)
            points = curve(model, deltas, rows, before, options.start / size["squares"])
            crossed = {str(rise): crossing(points, rise) for rise in RISES}
            table.append({"what": name, "weights": len(deltas), "gauges": size, "points": points, "scales": crossed})
            print(f"    {crossed}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "breaking.json").write_text(json.dumps({"before": before, "table": table}, indent=2) + "\n")
    for rise in RISES:
        for gauge in ("largest", "spectral", "sum", "squares"):
            sizes = [row["gauges"][gauge] * s for row in table if (s := row["scales"][str(rise)]) is not None]
            spread = max(sizes) / min(sizes)
            print(f"+{rise:.0%} {gauge:<9} {min(sizes):.3f} to {max(sizes):.3f}, × {spread:.1f}, "
                  f"median {statistics.median(sizes):.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
