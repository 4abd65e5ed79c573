"""What torchrun starts in tests: several command lines one after another, so that libraries are imported once.

The argument is a JSON file: {"folder", "scenarios": [{"arguments", "trouble", "arguments of rank 1"}]}. Every rank
leaves code, stdout, stderr and seconds of scenario i in folder/<rank>-<i>.json, and what the primitives gave it in
folder/<rank>-primitives.json.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from kpatch import distributed
from kpatch.cli.app import main
from kpatch.edit.writes import JointObjective
from kpatch.errors import BadInput

RANK = int(os.environ["RANK"])
_search = JointObjective.search


def troubled(trouble: str) -> Any:
    """Finding values, with rank 1 in trouble while rank 0 is at work for a long time."""

    def search(*arguments: Any) -> Any:
        if RANK == 1:
            if trouble == "interrupt":
                raise KeyboardInterrupt
            raise BadInput("rank 1 is unwell") if trouble == "error" else ZeroDivisionError("one over nothing")
        for _ in range(1800):
            time.sleep(0.1)  # a step that can be interrupted
        return _search(*arguments)

    return search


def primitives() -> dict[str, Any]:
    """share, main_does and nesting, between join and leave."""
    distributed.join()
    try:
        return {
            "share": distributed.share(range(5), lambda task: [task, RANK]),
            "none": distributed.share([], lambda task: task),
            "main": distributed.main_does(lambda: RANK),
            "nested": distributed.main_does(lambda: distributed.share([1, 2, 3], lambda task: task + RANK)),
            "within": distributed.share(
                [0, 1], lambda task: [distributed.is_main(), distributed.main_does(lambda: RANK)]
            ),
            "main rank": distributed.is_main(),
            "mine": [distributed.mine(index) for index in range(3)],
        }
    finally:
        distributed.finish()
        distributed.leave()


def scenario(about: dict[str, Any]) -> dict[str, Any]:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    JointObjective.search = troubled(about["trouble"]) if about.get("trouble") else _search  # type: ignore[method-assign]
    arguments = about.get("arguments of rank 1", about["arguments"]) if RANK else about["arguments"]
    out, err = io.StringIO(), io.StringIO()
    begun = time.monotonic()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(arguments)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "seconds": time.monotonic() - begun}


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder = Path(given["folder"])
    (folder / f"{RANK}-primitives.json").write_text(json.dumps(primitives()), encoding="utf-8")
    for number, about in enumerate(given["scenarios"]):
        (folder / f"{RANK}-{number}.json").write_text(json.dumps(scenario(about)), encoding="utf-8")
