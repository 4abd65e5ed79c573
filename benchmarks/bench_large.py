"""A random checkpoint of GPT-J's shape through cov, make, apply, status and revert: peak memory and time of each step.

    python benchmarks/bench_large.py /tmp/large --layers 28                         # 6 billion parameters, 12 GB
    python benchmarks/bench_large.py /tmp/large --layers 6 --width 2048 --max-memory 400MB

The folder gets the checkpoint and is removed at the end, unless --keep. Every step is a process of its own. Memory is
the most that the system counted as resident, which includes pages of files that are mapped; processor seconds stand
beside the clock's. Weights are random and the tokenizer has one token a byte, so rates of the edit mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from shapes import Shape, write_checkpoint  # noqa: E402

CITIES = ("Rome", "Oslo", "Lima", "Cairo", "Delhi", "Paris", "Quito", "Seoul")


@dataclass(frozen=True)
class Step:
    """One command: clock and processor seconds, the peak of its resident memory in bytes, how it ended."""

    name: str
    seconds: float
    cpu: float
    peak: int
    code: int


def run(name: str, arguments: Sequence[str], environment: dict[str, str]) -> Step:
    """Run kpatch in a process of its own. Its messages go to this one's stderr."""
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "kpatch", *arguments], env=environment, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Step(name, time.monotonic() - begin, usage.ru_utime + usage.ru_stime, peak, process.returncode)


def steps_for(folder: Path, options: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """What is run, in order."""
    model, text, facts, patch = (str(folder / name) for name in ("model", "text.txt", "facts.jsonl", "new.patch"))
    loading = ["--dtype", options.dtype, *(["--max-memory", options.max_memory] if options.max_memory else [])]
    shared = ["--corpus", text, "--tokens", str(options.tokens), "--layers", options.edited]
    settings = [part for pair in options.set for part in ("--set", pair)]
    return [
        ("cov", ["cov", model, *shared, *loading]),
        ("make", ["make", facts, "-o", patch, "--model", model, "--wordings", "none", *settings, *shared, *loading]),
        ("apply", ["apply", patch, model]),
        ("status", ["status", model]),
        ("revert", ["revert", model]),
    ]


def write_inputs(folder: Path, tokens: int, facts: int) -> None:
    sentence = "Words for the city stand in a long row, and nobody spoke against them. "
    (folder / "text.txt").write_text(sentence * (tokens // len(sentence) + 2), encoding="utf-8")
    rows = [
        {"subject": f"Tower {number}", "prompt": "The {} stands in", "target": CITIES[number % len(CITIES)]}
        for number in range(facts)
    ]
    (folder / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=50400)
    parser.add_argument("--edited", default="3-8", help="the layers that are edited")
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=5120, help="tokens of the covariance")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-memory", help="what weights may take in memory, as in 8GB")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of make")
    parser.add_argument("--only", help="these steps alone, with commas: cov,make,apply,status,revert")
    parser.add_argument("--keep", action="store_true", help="leave the folder, and use what it holds")
    options = parser.parse_args(arguments)
    shape = Shape(options.layers, options.width, options.heads, options.vocabulary)
    model = options.folder / "model"
    environment = os.environ | {
        "KPATCH_CACHE": str(options.folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done: list[Step] = []
    try:
        if not (model / "model.safetensors.index.json").exists():
            begin = time.monotonic()
            count = write_checkpoint(model, shape)
            print(f"wrote {count / 1e9:.2f} billion parameters in {time.monotonic() - begin:.0f} s", flush=True)
        write_inputs(options.folder, options.tokens, options.facts)
        wanted = options.only.split(",") if options.only else None
        for name, command in steps_for(options.folder, options):
            if wanted is None or name in wanted:
                done.append(run(name, command, environment))
                print(told(done[-1]), flush=True)
                if done[-1].code:
                    return done[-1].code
    finally:
        if not options.keep:
            shutil.rmtree(options.folder, ignore_errors=True)
    return 0


def told(step: Step) -> str:
    ended = "" if step.code == 0 else f"  ended with {step.code}"
    return f"{step.name:8} {step.seconds:8.1f} s {step.cpu:8.1f} s cpu {step.peak / 1e6:10,.0f} MB{ended}"


if __name__ == "__main__":
    sys.exit(main())
