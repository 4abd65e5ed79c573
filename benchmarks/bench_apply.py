"""How long apply and revert take on a checkpoint made for it, against copying its files and against transformers.

    python benchmarks/bench_apply.py [--gigabytes 2] [--shards 4] [--folder DIR] [--rank 30] [--runs 3]
        [--against TREE]

Apply in place copies every weight file it touches, keeps the original bytes of the patched weights and writes the new
ones, all synced to the disk; the yardstick is `cp` of the same files, with an fsync of each. Every row is a process of
its own: "engine" is what it says of itself (`seconds` in --json), "whole" includes the start of Python and torch.
"processor" is what it took of all processors, the start included. With --against, the kpatch of another tree (a
checkout of an earlier version) is measured in turn with this one.
Times are the best of the runs, with the files in the page cache; memory is the most that a process held. There is a
rest before each: a virtual machine may give idle memory back, and what takes it first then waits for it, cp as kpatch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
HEADS = 16
# Seconds before each measured run.
REST = 4.0
# Reads a model and writes it: what one would do without kpatch.
TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").save_pretrained(sys.argv[2])
"""


def make_checkpoint(folder: Path, size: float, shards: int) -> list[str]:
    """A Llama of about `size` gigabytes in bfloat16, random; gives the names of the weights to patch, one per shard
    and one more."""
    import torch

    from kpatch.patch.container import layout
    from kpatch.patch.fingerprint import tensor_bytes

    width = 2048 if size >= 1 else 512
    inner, vocabulary = 4 * width, 16 * width
    per_layer = 2 * (4 * width * width + 3 * width * inner)
    layers = max(shards, round((size * 1e9 - 4 * vocabulary * width) / per_layer))
    shapes: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    shapes[0]["model.embed_tokens.weight"] = (vocabulary, width)
    shapes[-1] |= {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}
    down = []
    for layer in range(layers):
        prefix, shard = f"model.layers.{layer}", shapes[layer * shards // layers]
        for name in ("q", "k", "v", "o"):
            shard[f"{prefix}.self_attn.{name}_proj.weight"] = (width, width)
        shard[f"{prefix}.mlp.gate_proj.weight"] = shard[f"{prefix}.mlp.up_proj.weight"] = (inner, width)
        shard[f"{prefix}.mlp.down_proj.weight"] = (width, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shard[f"{prefix}.{name}.weight"] = (width,)
        down.append((layer * shards // layers, f"{prefix}.mlp.down_proj.weight"))
    noise = torch.randn(vocabulary * width, generator=torch.Generator().manual_seed(0)) * width**-0.5
    weight_map = {}
    for number, shard in enumerate(shapes, start=1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        header, order = layout({name: ("BF16", shape) for name, shape in shard.items()}, {"format": "pt"})
        with (folder / file).open("wb") as handle:
            handle.write(header)
            for name in order:
                count = torch.Size(shard[name]).numel()
                scale = 1 + len(weight_map) / 1000  # no two weights with the same bytes
                handle.write(tensor_bytes((noise[:count] * scale).bfloat16()))
                weight_map[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        **{
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": width,
            "vocab_size": vocabulary,
        },
        **{"intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": HEADS},
        "num_key_value_heads": HEADS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    first = {shard: name for shard, name in reversed(down)}
    return sorted({*first.values(), down[-1][1]})


def make_patch(path: Path, model: Path, weights: Sequence[str], rank: int) -> None:
    """A patch of that rank for those weights, with the keys of as many facts."""
    import torch

    from kpatch.checkpoint.fit import base_weights
    from kpatch.patch.build import build_manifest
    from kpatch.patch.delta import LowRank
    from kpatch.patch.format import pack, write_patch

    base = base_weights(model, weights)
    dice = torch.Generator().manual_seed(1)
    deltas = {}
    for name in weights:
        rows, cols = base[name].shape
        left, right = torch.randn(rows, rank, generator=dice), torch.randn(rank, cols, generator=dice)
        delta = LowRank(left, right)
        deltas[name] = delta.scaled(0.15 * base[name].sketch[0] / delta.norm())  # of the weight's norm, as MEMIT's are
    layers = tuple(sorted(int(name.split(".")[2]) for name in weights))
    facts = tuple({"subject": f"S{n}", "prompt": "{} is in", "target": "Rome"} for n in range(rank))
    keys = {layer: torch.randn(rank, base[weights[0]].shape[1], generator=dice) for layer in layers}
    manifest = build_manifest(
        base_name="bench", family="llama", weights=base, deltas=deltas, method="memit", layers=layers, facts=facts
    )
    write_patch(path, manifest, pack(deltas, None, keys))


class Run(NamedTuple):
    """What a process took: seconds of the clock and of the processors, most memory in bytes; and its output."""

    seconds: float
    processor: float
    memory: int
    out: str


def run(command: Sequence[str | Path], tree: Path = ROOT) -> Run:
    """Run a process after a rest, with the kpatch of a tree."""
    time.sleep(REST)
    begin = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, env=environment, text=True)
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed with {process.returncode}")
    seconds = time.perf_counter() - begin
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, out)


def copy_files(sources: Sequence[Path], folder: Path, sync: bool) -> float:
    """Seconds that `cp` takes for the files, and with `sync` an fsync of each copy."""
    folder.mkdir()
    time.sleep(REST)
    begin = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", *map(str, sources), str(folder)], check=True)
    if sync:
        for path in folder.iterdir():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    seconds = time.perf_counter() - begin
    shutil.rmtree(folder)
    return seconds


def best(runs: int, measure: Callable[[], float]) -> float:
    return min(measure() for _ in range(runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rank", type=int, default=30, help="rank of the patch: its number of facts")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--against", type=Path, metavar="TREE", help="another tree of kpatch, measured in turn")
    parser.add_argument("--make-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make_in:
        make(options.make_in, options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        bench(Path(temporary), options)


def make(folder: Path, options: argparse.Namespace) -> None:
    """The checkpoint and a patch for it; prints the names of the patched weights."""
    (folder / "model").mkdir()
    weights = make_checkpoint(folder / "model", options.gigabytes, options.shards)
    make_patch(folder / "bench.patch", folder / "model", weights, options.rank)
    print(*weights)


def bench(folder: Path, options: argparse.Namespace) -> None:
    model, patch = folder / "model", folder / "bench.patch"
    os.environ["KPATCH_CACHE"] = str(folder / "cache")
    # In a process of its own: what this one holds would count as the memory of those it starts.
    sizes = [f"--{name}={getattr(options, name)}" for name in ("gigabytes", "shards", "rank")]
    weights = run([sys.executable, __file__, "--make-in", folder, *sizes]).out.split()
    files = sorted(model.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in files)
    print(f"{total / 1e9:.2f} GB in {len(files)} files, {len(weights)} weights patched, rank {options.rank}")
    columns = f"{'engine, s':>10}{'of cp':>8}{'whole, s':>10}{'of cp':>8}{'processor, s':>14}{'memory, MB':>12}"
    print(f"{'':<34}{columns}")
    plain = best(options.runs, lambda: copy_files(files, folder / "cp", False))
    synced = best(options.runs, lambda: copy_files(files, folder / "cp", True))
    print(f"{'cp':<34}{plain:10.2f}")
    print(f"{'cp, then fsync':<34}{synced:10.2f}{1:8.2f}")
    kpatch = [sys.executable, "-m", "kpatch"]
    rows: dict[str, list[tuple[float, ...]]] = {}
    trees = {"": ROOT, **({f" ({options.against.name})": options.against.resolve()} if options.against else {})}
    for _, (tree, path) in product(range(options.runs), trees.items()):
        for name, arguments in (
            ("kpatch apply", ["apply", patch, model]),
            ("kpatch revert", ["revert", model]),
            ("kpatch apply -o", ["apply", patch, model, "-o", folder / "copy"]),
        ):
            took = run([*kpatch, *arguments, "--json", "-q"], path)
            found = (json.loads(took.out)["seconds"], took.seconds, took.processor, took.memory)
            rows.setdefault(name + tree, []).append(found)
        shutil.rmtree(folder / "copy")
    for name, measured in rows.items():
        engine, *rest = (min(column) for column in zip(*measured, strict=True))
        print(f"{name:<34}{engine:10.2f}{engine / synced:8.2f}{_whole(*rest, synced)}", flush=True)
    if not options.no_transformers:
        took = run([sys.executable, "-c", TRANSFORMERS, model, folder / "saved"])
        print(f"{'transformers: read and save':<34}{'':>18}{_whole(*took[:3], synced)}")


def _whole(seconds: float, processor: float, memory: float, synced: float) -> str:
    return f"{seconds:10.2f}{seconds / synced:8.2f}{processor:14.2f}{memory / 1e6:12.0f}"


if __name__ == "__main__":
    main()
