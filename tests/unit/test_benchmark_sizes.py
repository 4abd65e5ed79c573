"""The benchmarks of size on tiny shapes: they run from end to end, and what they print is what they measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kpatch.models.address import resolve
from kpatch.models.model import load_model
from tests.support.benchmarks import benchmark_module

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(scope="module")
def device_benchmark() -> ModuleType:
    torch.set_num_threads(1)
    sys.path.insert(0, BENCHMARKS)
    return benchmark_module("bench_device")


def test_a_device_is_measured(device_benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert device_benchmark.main(["--tiny", "--facts", "2", "--steps", "2", "--samples", "1", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    for key in ("values_per_second", "covariance_tokens_per_second", "trace_cells_per_second", "peak_memory_bytes"):
        assert found[key] > 0
    shares = [one["share"] for one in found["profile"]]
    assert len(shares) == 5
    assert shares == sorted(shares, reverse=True)
    assert torch.cuda.is_available() or "No GPU" in printed.err


def test_a_random_checkpoint_has_the_shape_and_loads(device_benchmark: ModuleType, tmp_path: Path) -> None:
    shapes = sys.modules["shapes"]
    shape = shapes.Shape(layers=3, width=32, heads=2, vocabulary=300)
    count = shapes.write_checkpoint(tmp_path, shape)
    model = load_model(resolve(str(tmp_path)), device="cpu", dtype="bfloat16")
    assert count == sum(one.numel() for one in model.net.parameters())
    assert (model.n_layers, model.width, model.mlp_width) == (3, 32, 128)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_gpt_j_has_six_billion_parameters(device_benchmark: ModuleType) -> None:
    shapes = sys.modules["shapes"]
    count = sum(one.numel() for one in shapes.meta(shapes.Shape()).parameters())
    assert 6.0e9 < count < 6.1e9


def test_the_steps_of_a_large_model_are_commands(tmp_path: Path) -> None:
    large = benchmark_module("bench_large")
    step = large.run("models", ["models", "-q"], {"PATH": "/usr/bin", "PYTHONPATH": str(Path(BENCHMARKS).parent)})
    assert step.code == 0
    assert step.peak > 1e6
    assert large.run("status", ["status", str(tmp_path / "none")], {"PATH": "/usr/bin"}).code != 0
