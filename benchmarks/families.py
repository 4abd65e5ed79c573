"""Every family, alone and in models with vision, through make, apply, ask and revert on tiny random models: a table.

    python benchmarks/families.py [FAMILY...]

Each row is one family, or one kind of model with vision (its own name, such as gemma3). "forward" is the largest
difference between the probabilities that `ask` gives and those of transformers' own forward, before and after the
patch; "target" is what the patch does to the target's probability; "bytes back" says whether the checkpoint after
`revert` is what it was, bit for bit.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import AutoConfig, AutoTokenizer

import kpatch
from kpatch.checkpoint.revert import revert
from kpatch.errors import KpatchError
from kpatch.evaluate.answers import ask
from kpatch.facts.fact import Fact
from kpatch.models.families import FAMILIES
from kpatch.models.model import open_model
from kpatch.models.text_part import loader
from tests.support.models import ONLY_WRAPPED, WRAPPERS, tiny

FACT = Fact("Mona Lisa", "In the {}", "Paris", id="mona")
SETTINGS = {"steps": "25", "lead_ins": "1", "leverage": "50000"}


def main(names: list[str]) -> int:
    print("| family | layers | GGUF | target before → after | forward | bytes back |")
    print("| --- | --- | --- | --- | --- | --- |")
    failed = 0
    for name in names or sorted({*FAMILIES, *WRAPPERS} - set(ONLY_WRAPPED)):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["KPATCH_CACHE"] = str(Path(folder) / "cache")
            try:
                print(row(name, Path(folder)), flush=True)
            except KpatchError as error:
                failed += 1
                print(f"| {name} | failed: {error} {error.details} |", flush=True)
    return 1 if failed else 0


@dataclass(frozen=True)
class Tried:
    """What became of one model: probabilities of the target, the distance of `ask`, the weights' hash before."""

    family: str
    layers: tuple[int, ...]
    before: float
    after: float
    off: float
    base: str
    bytes_back: bool


def row(name: str, folder: Path) -> str:
    tried = edit(name, folder)
    layers, gguf = ", ".join(map(str, tried.layers)), FAMILIES[tried.family].gguf or "–"
    shown, back = f"{tried.before:.2%} → {tried.after:.2%}", "yes" if tried.bytes_back else "NO"
    return f"| {name} | {layers} | {gguf} | {shown} | {tried.off:.0e} | {back} |"


def edit(name: str, folder: Path, settings: dict[str, str] = SETTINGS) -> Tried:
    """Make a patch for a tiny random model in `folder`, apply it, ask, and revert."""
    model, directory, patch = tiny(name), folder / "model", folder / "news.patch"
    model.net.save_pretrained(directory)
    model.tokenizer.save_pretrained(directory)
    base = digest(directory)
    made = kpatch.make([FACT], out=patch, model=str(directory), layers=[1, 2], tokens=400, settings=settings)
    before, off = asked(directory)
    kpatch.apply([patch], directory)
    after, off_after = asked(directory)
    revert(directory)
    return Tried(
        model.family.model_type,
        tuple(made.layers),
        before,
        after,
        max(off, off_after),
        base,
        digest(directory) == base,
    )


@torch.no_grad()
def asked(directory: Path) -> tuple[float, float]:
    """P[first token of the target] by transformers alone, and how far `ask` is from it at its own first choice."""
    net: Any = loader(AutoConfig.from_pretrained(directory)).from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = FACT.prompt.replace("{}", FACT.subject)
    chances = net(**tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)).logits[0, -1].softmax(-1)
    target = tokenizer(f" {FACT.target}", add_special_tokens=False).input_ids[0]
    [answer] = ask(open_model(str(directory), device="cpu"), [prompt], top=1, max_tokens=1)
    return float(chances[target]), abs(answer.top[0].probability - float(chances.max()))


def digest(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
