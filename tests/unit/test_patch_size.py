"""How large a patch or a sum is: against dense matrices, and when it is warned of."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from kpatch.checkpoint.apply import apply
from kpatch.patch.delta import Delta, Dense, LowRank
from kpatch.patch.format import read_patch
from kpatch.patch.header import read_header
from kpatch.patch.size import (
    RISEN_5,
    RISEN_50,
    WARN_ABOVE,
    parts_by_weight,
    share,
    size,
    size_of,
    size_of_sum,
    warning,
)
from kpatch.patch.stack import stack
from kpatch.patch.summands import Part, summands
from tests.support.checkpoints import CONV1D, WEIGHTS, make_checkpoint, make_patch, random, weights
from tests.support.reports import Recorder

SAID = "raised perplexity"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


def dense_size(model: Path, path: Path) -> float:
    """‖Δ‖ / ‖W‖ over the layers of a patch, from the dense matrices."""
    read, base = read_patch(path), weights(model)
    squares = [(delta.dense().norm() / base[name].double().norm()).square() for name, delta in read.deltas.items()]
    return math.sqrt(sum(map(float, squares)))


def test_the_share_of_a_sum_is_that_of_the_dense_sum() -> None:
    deltas: list[Delta] = [LowRank(random(6, 2, seed=1), random(2, 9, seed=2)), Dense(random(6, 9, seed=3))]
    deltas += [LowRank(random(6, 3, seed=4), random(3, 9, seed=5))]
    for some in (deltas, deltas[::2], deltas[:1]):
        dense = torch.stack([delta.dense() for delta in some]).sum(0)
        assert share(some, 2.0) == pytest.approx(float(dense.norm()) / 2, rel=1e-12)
    assert (share([deltas[0]], 0.0), share([Dense(torch.zeros(2, 2))], 0.0)) == (math.inf, 0.0)
    assert size([3.0, 4.0]) == 5.0


@pytest.mark.parametrize("names", [WEIGHTS, CONV1D])
def test_the_size_of_a_patch_from_its_header(tmp_path: Path, names: tuple[str, ...]) -> None:
    model = make_checkpoint(tmp_path / "model", conv1d=names is CONV1D)
    make_patch(tmp_path / "a.patch", model, weights=names)
    info = read_header(tmp_path / "a.patch")
    assert size_of(info.manifest) == pytest.approx(dense_size(model, info.path), rel=1e-6)
    assert size_of_sum(parts_by_weight([info])) == size_of(info.manifest)


def test_the_size_of_a_sum_is_that_of_what_is_added(tmp_path: Path, model: Path) -> None:
    for number, some in enumerate((WEIGHTS, WEIGHTS[:2]), start=1):
        make_patch(tmp_path / f"{number}.patch", model, weights=some, seed=number)
    infos = [read_header(tmp_path / f"{number}.patch") for number in (1, 2)]
    base = weights(model)
    dense = 0.0
    for name in WEIGHTS:
        parts = [Part(info, name) for info in infos if name in info.manifest.deltas]
        total = torch.stack([delta.dense() for delta in summands(parts)]).sum(0)
        dense += float(total.norm() / base[name].double().norm()) ** 2
    assert size_of_sum(parts_by_weight(infos)) == pytest.approx(math.sqrt(dense), rel=1e-6)
    # Patches that take each other back are no change, however large each is
    both = [[Part(infos[0], name), Part(infos[0], name, -1.0)] for name in WEIGHTS]
    assert size_of_sum(both) == pytest.approx(0, abs=1e-6)


def test_a_large_patch_is_warned_of_and_an_ordinary_one_is_not(tmp_path: Path, model: Path) -> None:
    make_patch(tmp_path / "large.patch", model, scale=0.1)
    make_patch(tmp_path / "small.patch", model, scale=0.001, seed=2)
    for name, warned in (("small", False), ("large", True)):
        report = Recorder()
        apply(tmp_path / f"{name}.patch", model, check=True, report=report)
        said = [text for text in report.warnings if SAID in text]
        assert len(said) == warned
        if warned:
            found = size_of(read_header(tmp_path / "large.patch").manifest)
            assert said[0].startswith(f"large changes weights by {found:.0%} of their norm")


def test_a_sum_is_warned_of_where_no_patch_is_large(tmp_path: Path, model: Path) -> None:
    paths = [tmp_path / f"{number}.patch" for number in range(3)]
    for number, path in enumerate(paths):
        make_patch(
            path, model, scale=0.1, seed=1, facts=[{"subject": f"S{number}", "prompt": "{} is in", "target": "X"}]
        )
    alone = size_of(read_header(paths[0]).manifest)
    factor = 0.9 * WARN_ABOVE / alone
    for count, warned in ((1, False), (3, True)):
        report = Recorder()
        stack(paths[:count], scales=[factor] * count, report=report)
        said = [text for text in report.warnings if SAID in text]
        assert len(said) == warned
        assert all(f"the sum of 3 patches changes weights by {2.7 * WARN_ABOVE:.0%}" in text for text in said)


def test_what_a_warning_says() -> None:
    assert warning("x", WARN_ABOVE, "stop") is None
    said = warning("x", 2 * WARN_ABOVE, "stop")
    assert said is not None
    for words in (f"{2 * WARN_ABOVE:.0%}", f"by 5 % at {RISEN_5:.0%}", f"by 50 % at {RISEN_50:.0%}", "stop"):
        assert words in said


def test_a_difference_of_checkpoints_is_no_edit(tmp_path: Path, model: Path) -> None:
    make_patch(tmp_path / "a.patch", model, scale=1.0, facts=[])
    info = read_header(tmp_path / "a.patch")
    assert (size_of(info.manifest), size_of_sum(parts_by_weight([info]))) == (0.0, 0.0)
