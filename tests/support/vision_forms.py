"""One text model in the forms in which it is saved: alone, and in a wrapper under earlier and later names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from kpatch.models.model import Model
from tests.support.models import tiny

NEW = "model.language_model."


def three_forms(wrapper: str, folder: Path) -> dict[str, Path]:
    """Directories of one tiny model: "text" alone, in a wrapper "old" as it is saved and "new" as it is in memory."""
    # transformers caps the logits of Gemma 3 alone and not in a wrapper; no Gemma 3 that was published has a cap
    whole = tiny(wrapper, final_logit_softcapping=None)
    old = save(whole, folder / "old")
    return {
        "text": text_alone(whole, folder / "text"),
        "old": old,
        "new": as_in_memory(whole, old, folder / "new"),
    }


def save(model: Model, folder: Path) -> Path:
    model.net.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def text_alone(whole: Model, folder: Path) -> Path:
    """The text part of a wrapper as a checkpoint of its own."""
    net: Any = AutoModelForCausalLM.from_config(whole.config, dtype=torch.float32)
    stored = whole.net.state_dict()
    net.load_state_dict(
        {name.replace(NEW, "model."): weight for name, weight in stored.items() if name.startswith((NEW, "lm_head"))}
    )
    net.save_pretrained(folder)
    whole.tokenizer.save_pretrained(folder)
    return folder


def as_in_memory(whole: Model, directory: Path, folder: Path) -> Path:
    """A wrapper's checkpoint under the names that its weights have in memory, the other form that hubs hold."""
    folder.mkdir()
    for file in directory.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    kept = {name for name, _ in whole.net.named_parameters()}  # a tied head once
    weights = {name: weight.contiguous() for name, weight in whole.net.state_dict().items() if name in kept}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
