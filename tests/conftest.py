"""Settings of every test: no network, caches in a temporary folder, the same examples each run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.support.cli import Light

# Before any library reads them
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from more, and two workers share the cores
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

settings.register_profile(
    "all", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.register_profile("quick", settings.get_profile("all"), max_examples=20)


def pytest_configure(config: pytest.Config) -> None:
    """Fewer random examples where slow tests are left out; tests with a number of their own scale it."""
    settings.load_profile("quick" if "not slow" in config.getoption("markexpr") else "all")


@pytest.fixture(scope="session")
def _caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for each test, with no listing of those that there are: thousands of tests would list thousands."""
    base = tmp_path_factory.mktemp("caches")
    return (base / str(number) for number in count())


@pytest.fixture(autouse=True)
def _own_cache(_caches: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or leaves anything in a user's cache."""
    folder = next(_caches)
    monkeypatch.setenv("KPATCH_CACHE", str(folder / "kpatch"))
    monkeypatch.setenv("HF_HOME", str(folder / "huggingface"))
    for name in ("KPATCH_DEBUG", "NO_COLOR", "COLUMNS", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def _statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("statistics")


@pytest.fixture(scope="module")
def shared_statistics(_statistics: Path) -> Iterator[None]:
    """Sampled text and second moments are kept in one folder for all files that ask for this, whatever their caches.

    They are most of what a small edit takes, and their names tell of all that they depend on. Files whose subject
    they are do without. What else is cached (values, progress, fingerprints) stays each test's own.
    """
    from kpatch.stats import cache

    def kept(*parts: str) -> Path:
        folder = _statistics.joinpath(*parts)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    with pytest.MonkeyPatch.context() as context:
        context.setattr(cache, "cache_dir", kept)
        yield


@pytest.fixture(scope="module")
def light() -> Iterator[Light]:
    """Runs command lines that must import nothing heavy."""
    from tests.support.cli import Light

    with Light() as process:
        yield process


@pytest.fixture
def own_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that must find all anew takes nothing from `shared_statistics`."""
    from kpatch.cache import cache_dir
    from kpatch.stats import cache

    monkeypatch.setattr(cache, "cache_dir", cache_dir)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
