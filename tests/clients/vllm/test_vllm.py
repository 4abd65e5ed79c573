"""vLLM serves the exported folder beside its base: without it the old answers, with it the patch's facts."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import news
from tests.support.cli import run


@news.needs_smollm2
def test_vllm_answers_with_the_facts_of_the_patch(
    tmp_path: Path, smollm2: Path, client: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    done = run("export", news.PATCH, "--to", "peft", "--base", "smollm2", "-o", tmp_path / "lora")
    assert done.code == 0, done.err
    rank = re.search(r"--max-lora-rank (\d+)", done.err)  # what export recommends
    assert rank is not None, done.err
    found = client(
        {
            "model": str(smollm2),
            "adapter": str(tmp_path / "lora"),
            "max_lora_rank": int(rank[1]),
            "prompts": news.prompts(),
        }
    )
    assert news.known(found["without"]) == 0, found["without"]
    assert news.known(found["adapted"]) == 12, found["adapted"]
