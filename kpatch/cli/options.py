"""Options that several commands share, and how a message names an option of the command that runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No notes and no progress.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Report more: every step with its time.")]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="An alias, a hub id with optional @revision, a checkpoint directory or a GGUF file."
    ),
]
Patch = Annotated[Path, typer.Argument(metavar="PATCH", help="A patch file.")]
Checkpoint = Annotated[
    Path | None,
    typer.Argument(
        metavar="MODEL_DIR", help="A checkpoint directory. Default: the one here, else the one last applied to."
    ),
]
Facts = Annotated[Path, typer.Argument(metavar="FACTS", help="A fact file: YAML, JSON Lines or CSV.")]
# Beside a MODEL; facts_and_model understands either order
FactsFirst = Annotated[str, typer.Argument(metavar="FACTS", help="A fact file: YAML, JSON Lines or CSV.")]
Patches = Annotated[
    list[Path] | None,
    typer.Option(
        "--patch", metavar="PATCH", help="Try this patch in memory, beside the model without; can be repeated."
    ),
]
NewPatch = Annotated[Path | None, typer.Option("-o", "--out", metavar="PATCH", help="The file to write.")]
Force = Annotated[bool, typer.Option("--force", help="Write over an existing file.")]
FirstFacts = Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="The first N facts only.")]
Resume = Annotated[
    bool, typer.Option("--resume/--afresh", help="Use what earlier and interrupted runs left in the cache.")
]
MinRate = Annotated[float | None, typer.Option(min=0.0, max=1.0, metavar="RATE", help="Exit 1 below this rate.")]

Device = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="auto, cpu, cuda, cuda:1 …; auto spreads a model that is too large for one GPU."
    ),
]
Dtype = Annotated[
    str,
    typer.Option(metavar="NAME", help="auto, float32, mixed, bfloat16 or float16; auto is float32 or mixed on a CPU."),
]
Exact = Annotated[
    bool,
    typer.Option("--exact", help="The same as --dtype float32: no products in bfloat16, which auto may choose."),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="How much memory the weights may take, 8GB or cuda:0=20GB,cpu=30GB; the rest stays on the disk."
        " Default: what is free.",
    ),
]
Modules = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES", help="Module names for a family not in the table: layers=…,down=…,attn_out=…,norm=…"
    ),
]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="The same seed gives the same patch.")]
Layers = Annotated[
    str | None, typer.Option(metavar="LAYERS", help="The layers to edit: 4-8, or 4,5,6. Default: the model's preset.")
]
Corpus = Annotated[
    str,
    typer.Option(
        metavar="self|PATH|NAME",
        help="Text for the covariance: self (sampled from the model), a text, JSON Lines or parquet file,"
        " or a hub dataset.",
    ),
]
Tokens = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Tokens of the corpus to use. Default: 10 × MLP width.")
]
Memory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="How much memory activations may take, as in 2GB. Default: 1.5GB.")
]


def examples(*commands: str) -> str:
    """The end of a command's help; the first character tells Typer not to wrap the lines."""
    return "\b\n" + "\n".join(("Examples:", *(f"  {command}" for command in commands)))


# The Python parameter and its option have the same name, but for these
_OTHER_NAMES = {"set": "settings", "scale": "scales"}
_PARAMETER = re.compile(r"`([a-z][a-z_]*)(?:=([^`]*))?`")


@cache
def parser_of(app: typer.Typer) -> Any:
    """The parser of all commands, built once: building it takes longer than many a command."""
    return typer.main.get_command(app)


def option_names(app: typer.Typer, command: str | None) -> dict[str, str]:
    """What each Python parameter of a command is called on the command line: `out` is -o, `layers_from` --layers-from.

    An argument is called by its metavar. Without a command, or for an unknown one, there are none.
    """
    commands: Mapping[str, Any] = parser_of(app).commands
    names: dict[str, str] = {}
    for parameter in getattr(commands.get(command or ""), "params", ()):
        argument = parameter.param_type_name == "argument"
        shown = str(parameter.metavar or parameter.name.upper()) if argument else str(parameter.opts[0])
        name = str(parameter.name).rstrip("_")
        names |= {name: shown, _OTHER_NAMES.get(name, name): shown}
    return names


def with_options(text: str, names: Mapping[str, str]) -> str:
    """`text` with every parameter in backticks as its option: `force` is --force, `dtype=float32` --dtype float32.

    What is no parameter of the command stays as it is.
    """

    def option(match: re.Match[str]) -> str:
        name, value = match.groups()
        if name not in names:
            return match.group()
        return names[name] if value in (None, "True") else f"{names[name]} {value}"

    return _PARAMETER.sub(option, text)
