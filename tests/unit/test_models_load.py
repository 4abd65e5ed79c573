"""Loading a checkpoint directory: what is reported, what is left as it was, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kpatch.models.model import open_model
from kpatch.reporter import Advance
from tests.support.models import tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny Llama directory; tests copy it before they change it."""
    model = tiny("llama")
    folder = tmp_path_factory.mktemp("whole") / "llama"
    model.net.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


class Heard:
    """A reporter that keeps what it was given."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def task(self, description: str, total: int | None = None, unit: str = "") -> Iterator[Advance]:
        self.lines.append(description)
        yield lambda amount: None

    def note(self, message: str) -> None:
        self.lines.append(message)

    def warn(self, message: str) -> None:
        self.lines.append(f"warning: {message}")


def test_an_address_is_reported_and_opened(llama: Path) -> None:
    heard = Heard()
    model = open_model(str(llama), device="cpu", report=heard)
    assert (model.name, model.path, model.n_layers) == ("llama", llama, 4)
    assert heard.lines == [f"{llama}: checkpoint directory {llama}", "Loading llama"]


def test_transformers_logs_as_before_after_a_load(llama: Path) -> None:
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_info()
        logging.enable_progress_bar()
        open_model(str(llama), device="cpu")
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(level)
        if not bars:
            logging.disable_progress_bar()
