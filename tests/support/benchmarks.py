"""The programs in benchmarks/ as modules, so that their parts can be tested."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def benchmark_module(name: str) -> ModuleType:
    """benchmarks/NAME.py, which is no package, under a name of its own."""
    called = f"benchmark_{name}"
    spec = importlib.util.spec_from_file_location(called, Path(__file__).parents[2] / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[called] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
