"""`kpatch export`: a patch for programs that know no patches."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kpatch.cli import options as opt
from kpatch.cli.output import Cell, Output, begin, percent
from kpatch.cli.tables import print_apply_report
from kpatch.errors import BadInput
from kpatch.patch.weight_names import is_wrapped
from kpatch.text import counted, format_size

if TYPE_CHECKING:
    from kpatch.export.base import BaseAddress
    from kpatch.export.formats import Exported
    from kpatch.export.lora import Adapter

EXAMPLES = opt.examples(
    "kpatch export news.patch --to peft --base smollm2 -o lora/",
    "kpatch export news.patch --to checkpoint --base model/ -o patched/",
)

# Ranks that vLLM can be started with.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_NO_VLLM = ("gptj", "gpt2")
_LOSS = 0.05  # as `apply` warns of rounding


class To(str, Enum):
    """What to export to."""

    peft = "peft"
    gguf = "gguf"
    checkpoint = "checkpoint"


def command(
    patch: opt.Patch,
    to: Annotated[
        To,
        typer.Option(
            help="peft: a LoRA adapter for PEFT, vLLM and llama.cpp's converter; gguf: a LoRA adapter for llama.cpp;"
            " checkpoint: a patched copy of --base."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="PATH", help="The directory (gguf: file) to write.")],
    max_rank: Annotated[
        int | None,
        typer.Option("--max-rank", min=1, metavar="N", help="Cut factors to this rank; the error is reported."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="For checkpoint: the checkpoint directory to copy. For peft: the hub id, directory or alias that the"
            " adapter names as its base; of a directory it takes the modules' names too. Default: the hub id that the"
            " patch was made for.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over an existing file (gguf).")] = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Write a patch as a LoRA adapter or a checkpoint."""
    output = begin(json, quiet, verbose)
    if base is None and to is To.checkpoint:
        raise BadInput("--to checkpoint needs --base MODEL_DIR")
    if base is not None and to is To.gguf:
        raise BadInput("--base is for --to checkpoint and --to peft; a GGUF adapter names no base")
    if max_rank is not None and to is To.checkpoint:
        raise BadInput("--max-rank is for adapters; a checkpoint holds the whole change")
    if force and to is not To.gguf:
        raise BadInput("--force replaces a file, and this writes a directory", hint="give -o a new directory")
    if base is not None and to is To.checkpoint:
        from kpatch.checkpoint.apply import apply

        print_apply_report(output, apply([patch], base, out=out, report=output), "Exported", "to")
        return

    from kpatch.export.formats import export_patch

    _print_result(
        output, export_patch(patch, out, to=to.value, max_rank=max_rank, base=base, force=force, report=output)
    )


def _print_result(output: Output, exported: Exported) -> None:
    found, out, base = exported.adapter, exported.path, exported.base
    rows: list[list[Cell]] = [
        [module.name, module.rank, percent(module.error), percent(module.key_error)] for module in found.modules
    ]
    modules = [
        {"name": module.name, "rank": module.rank, "error": module.error, "key_error": module.key_error}
        for module in found.modules
    ]
    output.result(
        {
            "patch": {"id": found.patch.id, "path": str(found.patch.path)},
            "to": exported.to,
            "path": str(out),
            "bytes": exported.bytes,
            "rank": found.rank,
            "modules": modules,
            "base": None if base is None else {"address": base.address, "revision": base.revision},
        }
    )
    output.table(("Module", "Rank", "Cut off", "of it on the facts' keys"), rows, right=(1, 2, 3))
    output.line(
        f"{out}  {format_size(exported.bytes)}: {counted(len(found.modules), 'module')}, rank {found.rank}, scale 1"
    )
    lost = max((module.key_error or 0.0 for module in found.modules), default=0.0)
    if lost > _LOSS:
        output.warn(
            f"rank {found.rank} takes up to {lost:.0%} of what a module gives the facts' keys; facts may be lost"
        )
    for note in _notes(found, out, base):
        output.note(note)


def _notes(found: Adapter, out: Path, base: BaseAddress | None) -> list[str]:
    """How each program takes it."""
    if base is None:
        return [f"llama.cpp: llama-cli -m MODEL.gguf --lora {out}"]
    notes = _peft(found, out, base)
    fitting = [rank for rank in _VLLM_RANKS if rank >= found.rank]
    if found.patch.manifest.base.family in _NO_VLLM:
        notes.append("vLLM: has no LoRA for this family; --to checkpoint serves there")
    elif not fitting:
        notes.append(f"vLLM: takes no rank above {_VLLM_RANKS[-1]}; export with --max-rank {_VLLM_RANKS[-1]}")
    else:
        notes.append(f"vLLM: --enable-lora --max-lora-rank {fitting[0]} --lora-modules name={out}")
    return notes


def _peft(found: Adapter, out: Path, base: BaseAddress) -> list[str]:
    named = found.patch.manifest.base.name
    if not base.loadable:
        from kpatch.models.aliases import alias_of

        given = alias_of(base.address) or "MODEL (a hub id or a directory)"
        return [
            f"PEFT: PeftModel.from_pretrained(model, {str(out)!r}); to load it without the model at hand, export with"
            f" --base {given}, because {base.address} is no address that PEFT finds"
        ]
    if base.network is None and is_wrapped(module.name for module in found.modules):
        return [
            f"PEFT: PeftModel.from_pretrained(model, {str(out)!r}), where model is {base.address} with vision"
            " (AutoModelForImageTextToText); with --base DIR, its directory, PEFT loads it by itself"
        ]
    auto = "AutoPeftModelForCausalLM" if base.network is None or base.network.causal else "AutoPeftModel"
    notes = [f"PEFT: {auto}.from_pretrained({str(out)!r}) loads {base.address} with it"]
    if base.network is None and base.address != named:
        notes.append(
            f"{base.address} was not looked up: if it is another form of {named}, with vision or without,"
            " its modules have other names, and --base DIR, its directory, takes those"
        )
    return notes
