"""`kpatch cov`: second moments of keys, computed ahead into the cache."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from kpatch import distributed
from kpatch.cli import options as opt
from kpatch.cli import parse
from kpatch.cli.output import begin
from kpatch.cli.targets import open_model
from kpatch.text import format_size

EXAMPLES = opt.examples("kpatch cov smollm2", "kpatch cov gpt-j --layers 3-8 --corpus wiki.txt --tokens 100000")


def command(
    model: opt.Model,
    layers: opt.Layers = None,
    corpus: opt.Corpus = "self",
    tokens: opt.Tokens = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="The same seed samples the same text.")] = 0,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    exact: opt.Exact = False,
    max_memory: opt.MaxMemory = None,
    modules: opt.Modules = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Compute the covariance of a model's keys ahead of `make`.

    It is cached, resumes after an interruption, and grows to more tokens without starting again.
    """
    output = begin(json, quiet, verbose)
    wanted, names = parse.layers(layers), parse.modules(modules)

    start = time.monotonic()
    upto = max(wanted) if wanted and corpus != "self" else None  # text that is given needs no layer above
    loaded = open_model(output, model, device, parse.dtype(dtype, exact), names, parse.max_memory(max_memory), upto)

    from kpatch.edit.methods import hyper_for, method_named
    from kpatch.stats.covariance import collect

    chosen = hyper_for(method_named("memit"), loaded, wanted, {}, output).layers
    covariance = collect(loaded, chosen, corpus=corpus, tokens=tokens, seed=seed, report=output)
    if not distributed.is_main():
        return
    width = max(moment.width for moment in covariance.moments.values())
    output.result(
        {
            "model": loaded.name,
            **covariance.to_dict(),
            "layers": list(chosen),
            "width": width,
            "seconds": time.monotonic() - start,
        }
    )
    rows = [
        (layer, f"{moment.count:,}", f"{f} × {f}", format_size(f * (f + 1) // 2 * 8))
        for layer, moment in covariance.moments.items()
        for f in [moment.width]
    ]
    output.table(("Layer", "Tokens", "Matrix", "Stored"), rows, right=(0, 1, 3))
    output.line(f"{loaded.name}: {covariance.corpus}, {covariance.tokens:,} tokens, id {covariance.id[:12]}")
