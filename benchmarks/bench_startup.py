"""How long the command line takes to start: the best of several runs of commands that must not load torch.

    python benchmarks/bench_startup.py [--imports]

The checkpoint has a few thousand weights, so that what is measured is the start and not the bytes. Seconds of the
clock and of the processor: the second do not show what else the machine does. With --imports also the modules that
cost most in `kpatch show`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_apply import make_checkpoint, make_patch

ROOT = Path(__file__).parents[1]
LIMIT = 0.3  # seconds of the processor
RUNS = 7


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        return bench(Path(temporary))


def bench(folder: Path) -> int:
    os.environ.update(KPATCH_CACHE=str(folder / "cache"), PYTHONPATH=str(ROOT))
    model, patch = folder / "model", folder / "small.patch"
    model.mkdir()
    make_patch(patch, model, make_checkpoint(model, 0, 1), rank=2)
    apply = [sys.executable, "-m", "kpatch", "apply", "-q", str(patch), str(model)]
    subprocess.run(apply, stdout=subprocess.DEVNULL, check=True)
    commands = {
        "python -c pass": ["-c", "pass"],
        "kpatch --help": ["-m", "kpatch", "--help"],
        "kpatch make --help": ["-m", "kpatch", "make", "--help"],
        "kpatch show": ["-m", "kpatch", "show", str(patch)],
        "kpatch show --json": ["-m", "kpatch", "show", str(patch), "--json"],
        "kpatch models": ["-m", "kpatch", "models"],
        "kpatch verify": ["-m", "kpatch", "verify", str(patch), str(model)],
        "kpatch status": ["-m", "kpatch", "status", str(model)],
        "kpatch log": ["-m", "kpatch", "log", str(model)],
        "kpatch revert --check": ["-m", "kpatch", "revert", "--check", str(model)],
        "kpatch revert": ["-m", "kpatch", "revert", str(model)],
    }
    slow = 0
    print(f"best of {RUNS} runs, seconds; the limit is {LIMIT} of the processor")
    print(f"{'command':<22} {'clock':>8} {'processor':>10}")
    for name, arguments in commands.items():
        if name == "kpatch revert":  # there is one patch to revert
            times = [_seconds([sys.executable, *arguments])]
        else:
            times = [_seconds([sys.executable, *arguments]) for _ in range(RUNS)]
        clock, processor = (min(column) for column in zip(*times, strict=True))
        slow += processor > LIMIT
        print(f"{name:<22} {clock:8.3f} {processor:10.3f}{'   TOO SLOW' if processor > LIMIT else ''}")
    if "--imports" in sys.argv:
        _imports(["-m", "kpatch", "show", str(patch)])
    return 1 if slow else 0


def _seconds(command: list[str]) -> tuple[float, float]:
    """Seconds of the clock and of the processor that a command takes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


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
