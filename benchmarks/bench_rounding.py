"""What rounding leaves of an edit: patches on float32, bfloat16 and float16 copies of a checkpoint, and their Score.

    python benchmarks/bench_rounding.py CHECKPOINT PATCH... [--facts FACTS] [--dtypes float32,bfloat16,float16]
        [--compute float32] [--folder DIR] [--weights]

Each patch by itself is applied to a copy in each dtype (`apply -o --dtype`), and the facts it carries are measured on
that copy as `kpatch make` measures them. The copy is loaded in --compute, float32 unless told otherwise, so that what
differs between rows is the stored weights alone. With --facts the wording of that file is used for the facts that the
patch carries; otherwise the wording in the patch. The row "unpatched" is the checkpoint in --compute without a patch.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kpatch.checkpoint.apply import WeightReport, apply
from kpatch.evaluate.metrics import measure
from kpatch.facts.fact import Fact
from kpatch.facts.load import load_facts
from kpatch.models.address import resolve
from kpatch.models.model import load_model
from kpatch.patch.header import read_header

RATES = ("efficacy", "generalization", "specificity")


def facts_of(patch: Path, file: Path | None) -> list[Fact]:
    """The facts that a patch carries, in the file's wording where there is one."""
    carried = [Fact.from_dict(dict(fact)) for fact in read_header(patch).manifest.facts]
    if file is None:
        return carried
    wanted = {(fact.subject, fact.prompt, fact.target) for fact in carried}
    found = [fact for fact in load_facts(file).facts if (fact.subject, fact.prompt, fact.target) in wanted]
    if len(found) != len(carried):
        raise SystemExit(f"{file} has {len(found)} of the {len(carried)} facts of {patch}")
    return found


def metrics(checkpoint: Path, facts: Sequence[Fact], compute: str) -> dict[str, Any]:
    model = load_model(resolve(str(checkpoint)), device="cpu", dtype=compute)
    return measure(model, facts, answer_tokens=0).metrics


def rates(found: dict[str, Any]) -> list[str]:
    cells = [found[name]["success"] if found[name] else None for name in RATES]
    return ["–" if rate is None else f"{100 * rate:.1f}" for rate in (*cells, found["score"])]


def spread(weights: Sequence[WeightReport], name: str) -> str:
    """Mean and largest over the weights, in percent."""
    values = [100 * value for weight in weights if (value := getattr(weight, name)) is not None]
    return f"{sum(values) / len(values):.2f} ({max(values):.2f})" if values else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("patches", type=Path, nargs="+")
    parser.add_argument("--facts", type=Path, help="a fact file, for its paraphrases and neighbors")
    parser.add_argument("--dtypes", default="float32,bfloat16,float16")
    parser.add_argument("--compute", default="float32", help="dtype in which the copies are loaded and run")
    parser.add_argument("--folder", type=Path, help="where copies go (default: the system's temporary folder)")
    parser.add_argument("--weights", action="store_true", help="a row for every weight as well")
    options = parser.parse_args()
    table = Table(caption="errors in percent, mean (largest) over the weights; rates in percent")
    columns = ("facts", "dtype", "entries unchanged", "error of Δ", "error of Δk", *RATES, "score")
    for name in ("patch", *columns):
        table.add_column(name, justify="left" if name in ("patch", "dtype") else "right")
    for patch in options.patches:
        facts = facts_of(patch, options.facts)
        before = metrics(options.checkpoint, facts, options.compute)
        table.add_row(patch.stem, str(len(facts)), "unpatched", "", "", "", *rates(before))
        for dtype in options.dtypes.split(","):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                copy = Path(folder) / "copy"
                weights = apply([patch], options.checkpoint, out=copy, dtype=dtype).weights
                shutil.rmtree(copy / ".kpatch")
                after = metrics(copy, facts, options.compute)
            errors = [spread(weights, name) for name in ("unchanged", "delta_error", "key_error")]
            table.add_row("", "", dtype, *errors, *rates(after))
            for weight in weights if options.weights else ():
                own = [spread([weight], name).split(" ")[0] for name in ("unchanged", "delta_error", "key_error")]
                table.add_row("", "", f"  {weight.name}", *own)
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
