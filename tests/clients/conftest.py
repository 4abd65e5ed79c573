"""Other programs read what kpatch wrote, each in an environment of its own: `make clients` makes them and runs this.

tests/clients/NAME/requirements.txt pins the environment .clients/NAME; run.py runs in it, without kpatch, and
answers JSON with JSON; test_NAME.py exports with this checkout and compares.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kpatch.models.address import resolve

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".clients"
_OWN = ("PYTHONPATH", "KPATCH_CACHE", "VIRTUAL_ENV")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.clients)


@pytest.fixture
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Runs the run.py beside the test in that client's environment: JSON in, JSON out."""
    name = request.path.parent.name
    python = ENVIRONMENTS / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"there is no environment .clients/{name}; make clients CLIENTS={name} makes it")

    def run(given: dict[str, Any]) -> dict[str, Any]:
        done = subprocess.run(
            [python, HERE / name / "run.py"],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            env={key: value for key, value in os.environ.items() if key not in _OWN} | {"OMP_NUM_THREADS": "2"},
            cwd=tmp_path,
            check=False,
            timeout=1800,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        answer: dict[str, Any] = json.loads(done.stdout)
        print(f"{name}: {answer['versions']}")
        return answer

    return run


@pytest.fixture
def smollm2(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint directory of smollm2, converted once for all runs; KPATCH_CACHE is where it lies."""
    monkeypatch.setenv("KPATCH_CACHE", str(ENVIRONMENTS / "cache"))
    return resolve("smollm2").path
