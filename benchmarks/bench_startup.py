"""How long the command line takes to start: the best of several runs of commands that must not load torch.

    python benchmarks/bench_startup.py [--imports]

With --imports also the modules that cost most in `kpatch show`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 0.4  # seconds
RUNS = 7


def main() -> int:
    patch = next(iter(sorted((ROOT / "patches").rglob("*.patch"))), None) or ROOT / "tests" / "golden" / "tiny.patch"
    commands = {
        "python -c pass": ["-c", "pass"],
        "kpatch --help": ["-m", "kpatch", "--help"],
        "kpatch make --help": ["-m", "kpatch", "make", "--help"],
        "kpatch show": ["-m", "kpatch", "show", str(patch)],
        "kpatch show --json": ["-m", "kpatch", "show", str(patch), "--json"],
        "kpatch models": ["-m", "kpatch", "models"],
    }
    slow = 0
    print(f"{'command':<22} {'best':>8} {'median':>8}   of {RUNS} runs, seconds; the limit is {LIMIT}")
    for name, arguments in commands.items():
        times = sorted(_seconds([sys.executable, *arguments]) for _ in range(RUNS))
        slow += times[0] > LIMIT
        print(f"{name:<22} {times[0]:8.3f} {times[RUNS // 2]:8.3f}{'   TOO SLOW' if times[0] > LIMIT else ''}")
    if "--imports" in sys.argv:
        _imports(["-m", "kpatch", "show", str(patch)])
    return 1 if slow else 0


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def _imports(arguments: list[str]) -> None:
    """The ten modules whose import took longest by themselves."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = [line.removeprefix("import time:").split("|") for line in done.stderr.splitlines() if "|" in line]
    costs = [(int(own), name.strip()) for own, _, name in rows if own.strip().isdigit()]
    for own, name in sorted(costs, reverse=True)[:10]:
        print(f"{own / 1000:8.1f} ms  {name}")


if __name__ == "__main__":
    sys.exit(main())
