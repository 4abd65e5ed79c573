"""llama.cpp with the GGUF adapter: the quantized model answers with the patch's facts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import news
from tests.support.cli import run


@news.needs_smollm2
def test_llama_cpp_answers_with_the_facts_of_the_patch(
    tmp_path: Path, client: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    adapter = tmp_path / "news.gguf"
    assert run("export", news.PATCH, "--to", "gguf", "-o", adapter).code == 0
    found = client({"model": str(news.gguf_file()), "adapter": str(adapter), "prompts": news.prompts()})
    assert news.known(found["without"]) == 0, found["without"]
    assert news.known(found["adapted"]) == 12, found["adapted"]
