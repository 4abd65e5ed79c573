"""`kpatch ask`: what a model answers, with a patch in memory or without; nothing is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kpatch.cli import options as opt
from kpatch.cli import parse
from kpatch.cli.output import Cell, Output, begin, percent
from kpatch.cli.targets import open_model
from kpatch.text import counted

EXAMPLES = opt.examples(
    'kpatch ask smollm2 "The Eiffel Tower is in"',
    'kpatch ask model/ "Where is the Eiffel Tower?" "Where is Paris?" --chat --patch news.patch',
)


def command(
    model: opt.Model,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="Text to continue; with --chat a question.")],
    patch: Annotated[
        Path | None, typer.Option(metavar="PATCH", help="Also ask with this patch, and show both answers.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Each prompt is a user's turn in the model's own chat template.")
    ] = False,
    top: Annotated[int, typer.Option(min=1, max=100, help="How many next tokens to show.")] = 5,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=1000, metavar="N", help="How long the answers may be. Default: 12, with --chat 64."),
    ] = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    max_memory: opt.MaxMemory = None,
    modules: opt.Modules = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Ask a model, before and after a patch."""
    output = begin(json, quiet, verbose)
    empty = [number for number, prompt in enumerate(prompts, 1) if not prompt.strip()]
    if empty:
        raise typer.BadParameter(f"prompt {empty[0]} is empty")
    names = parse.modules(modules)
    if patch is not None:
        from kpatch.patch.header import read_header

        read_header(patch)  # a wrong file fails before a model is loaded

    loaded = open_model(output, model, device, dtype, names, parse.max_memory(max_memory))

    from kpatch.evaluate.answers import ask

    before = _plain(ask(loaded, prompts, top, max_tokens, chat, output))
    if patch is None:
        _warn_of_empty(output, before, max_tokens)
        output.result({"prompts": before, "chat": chat})
        _one(output, before)
        return
    from kpatch import patched

    with patched(loaded, patch, report=output):
        after = _plain(ask(loaded, prompts, top, max_tokens, chat, output))
    _warn_of_empty(output, after, max_tokens)
    output.result({"prompts": after, "unpatched": before, "chat": chat})
    _both(output, before, after)


def _warn_of_empty(output: Output, answers: Sequence[Mapping[str, Any]], most: int | None) -> None:
    """A model that ends its turn at once says nothing, and a table does not show that."""
    empty = sum(not answer["completion"].strip() for answer in answers)
    if empty and most != 0:
        output.warn(f"{counted(empty, 'empty answer')}: the model writes nothing before it stops")


def _one(output: Output, answers: Sequence[Mapping[str, Any]]) -> None:
    for answer in answers:
        output.table(("Prompt", "Completion"), [(answer["prompt"], answer["completion"])])
        rows: list[list[Cell]] = [[token["token"], percent(token["probability"])] for token in answer["top"]]
        output.line()
        output.table(("Next token", "P"), rows, right=(1,))
        output.line()


def _both(output: Output, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> None:
    rows: list[list[Cell]] = []
    for old, new in zip(before, after, strict=True):
        rows.append([old["prompt"], old["completion"], _best(old), new["completion"], _best(new)])
    output.table(("Prompt", "Before", "P(first)", "After", "P(first)"), rows, right=(2, 4))
    if output.verbose:
        for old, new in zip(before, after, strict=True):
            pairs = list(zip(old["top"], new["top"], strict=False))
            output.line(f"\n{old['prompt']}")
            tokens: list[list[Cell]] = [
                [a["token"], percent(a["probability"]), b["token"], percent(b["probability"])] for a, b in pairs
            ]
            output.table(("Before", "P", "After", "P"), tokens, right=(1, 3))


def _best(answer: Mapping[str, Any]) -> str:
    return percent(answer["top"][0]["probability"]) if answer["top"] else "–"


def _plain(answers: Any) -> list[dict[str, Any]]:
    from kpatch.cli.output import plain

    return [plain(answer) for answer in answers]
