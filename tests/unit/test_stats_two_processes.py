"""Two processes that want the same covariance at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import sys, time
import torch
torch.set_num_threads(1)
from kpatch.stats import covariance as module
from tests.support.models import tiny
from tests.support.reports import Recorder
model, report = tiny("llama"), Recorder()
original = module.run_to
def slow(*arguments):
    time.sleep(0.2)
    print("run", flush=True)
    return original(*arguments)
module.run_to = slow
print("ready", flush=True)
sys.stdin.readline()
found = module.collect(model, [0], corpus=sys.argv[1], tokens=203, row=16, batch_tokens=48, report=report)
print(found.id, float(found.moments[0].total.sum()), report.notes, flush=True)
"""


@pytest.mark.slow
def test_of_two_processes_one_collects_and_one_waits(tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("\n\n".join(f"The river runs through town {number} and into the sea." for number in range(200)))
    root = Path(__file__).parents[2]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, text], cwd=root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    said = []
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in both:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        said.append(out.splitlines())
    said.sort(key=len)
    assert [len(lines) for lines in said] == [1, 6]  # five runs in one of them, none in the other
    assert "from the cache" in said[0][-1]
    assert said[0][-1].split()[:2] == said[1][-1].split()[:2]
