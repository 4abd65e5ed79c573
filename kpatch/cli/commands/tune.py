"""`kpatch tune`: settings for a model by pilot edits, as a preset file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kpatch.cache import atomic_write_text
from kpatch.cli import options as opt
from kpatch.cli import parse
from kpatch.cli.output import Cell, Output, begin, percent
from kpatch.cli.targets import open_model
from kpatch.outputs import check_new_file

if TYPE_CHECKING:
    from kpatch.tune.judge import Verdict
    from kpatch.tune.search import Tuned

EXAMPLES = opt.examples("kpatch tune smollm2 --minutes 60", "kpatch tune gpt-j --quick -o gpt-j.yaml")


def command(
    model: opt.Model,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FILE", help="The preset file. Default: MODEL with suffix .preset.yaml."),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="N", help="Begin nothing that would end later. Default: 30; 3 with --quick."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only the layers R: three ranges, one edit of eight facts each.")
    ] = False,
    resume: opt.Resume = True,
    force: opt.Force = False,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="The same seed gives the same file.")] = 0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    exact: opt.Exact = False,
    max_memory: opt.MaxMemory = None,
    memory: opt.Memory = None,
    modules: opt.Modules = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Find settings for a model by pilot edits, for make --preset."""
    output = begin(json, quiet, verbose)
    path = check_new_file(out or _default_name(model), force=force, what="a preset file")
    budget, names = parse.memory(memory), parse.modules(modules)
    loaded = open_model(output, model, device, parse.dtype(dtype, exact), names, parse.max_memory(max_memory))

    from kpatch.tune.search import tune

    tuned = tune(loaded, minutes=minutes, quick=quick, seed=seed, memory=budget, resume=resume, report=output)
    preset = tuned.preset()
    atomic_write_text(path, preset.text())
    output.result(
        {
            "model": loaded.name,
            "preset": str(path),
            "method": preset.method,
            "layers": list(preset.layers or ()),
            "settings": tuned.setting.hyper.to_dict(),
            "wordings": tuned.setting.wordings,
            **tuned.to_dict(),
        }
    )
    _print(output, tuned)
    output.line(f"{path}  {tuned.notes()}")
    output.note(f"next: kpatch make FACTS --model {model} --preset {path}")


def _default_name(model: str) -> str:
    """The file beside the work: what the model is called, without the folders and revision of its address."""
    name = Path(model.partition("@")[0]).name or Path(model).resolve().name
    return f"{name}.preset.yaml"


def _print(output: Output, tuned: Tuned) -> None:
    """Every trial with its reason, then what the other half says."""
    rows: list[list[Cell]] = []
    for trial in tuned.trials:
        mark = "taken" if trial.chosen else ""
        rows.append([trial.what, trial.value, *_cells(trial.verdict), mark, f"{trial.reason} ({trial.origin})"])
    headers = ("Tried", "Value", "Score", "Efficacy", "Paraphrases", "Neighbors", "log P", "KL", "", "Why")
    output.table(headers, rows, right=(2, 3, 4, 5, 6, 7))
    output.line()
    chose, reported, left_out = tuned.facts
    told = f"{chose} pilot facts chose"
    if tuned.reported is not None:
        told += f", {reported} others report"
    output.line(f"{told}; {left_out} were left out, whose neighbors the model does not know")
    if tuned.reported is not None:
        before, after = tuned.reported
        named = [["defaults", *_cells(before)], ["chosen", *_cells(after)]]
        output.table(("Other half", *headers[2:8]), named, right=(1, 2, 3, 4, 5, 6))
    if not tuned.complete:
        output.warn("time was up before everything was tried: the same command with more `minutes` goes on")


def _cells(verdict: Verdict | None) -> list[Cell]:
    if verdict is None:
        return [None] * 6
    shares = (verdict.score, verdict.efficacy, verdict.paraphrases, verdict.neighbors)
    return [*(percent(share) for share in shares), f"{verdict.target + verdict.right:.2f}", f"{verdict.drift:.3f}"]
