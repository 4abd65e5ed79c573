"""What several benchmarks do alike: a result that is there is not measured again, and rates stand with intervals."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kpatch.cache import atomic_write_text


def measured_once(path: Path, measure: Callable[[], Any]) -> Any:
    """The JSON at `path`, which is measured and written first where it is not there."""
    if not path.exists():
        begin = time.monotonic()
        atomic_write_text(path, json.dumps(measure(), indent=2) + "\n")
        print(f"{path.stem}: {time.monotonic() - begin:.0f} s", flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def percent(rate: float | None, interval: Sequence[float] | None) -> str:
    """A rate in percent, with its 95 % interval where there is one."""
    if rate is None:
        return "–"
    return f"{100 * rate:.0f}" + ("" if interval is None else f" ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})")
