"""The adapter as PEFT stores one: a directory with adapter_config.json and adapter_model.safetensors.

Source: PEFT's documentation, "PEFT checkpoint format". vLLM and llama.cpp's converter read the same directory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from kpatch.cache import atomic_directory
from kpatch.export.base import BaseAddress
from kpatch.export.lora import Adapter
from kpatch.outputs import check_new_directory
from kpatch.patch.combine import text_of
from kpatch.text import printable

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
_FACTS_IN_CARD = 50


def config(found: Adapter, base: BaseAddress) -> dict[str, Any]:
    """The content of adapter_config.json: every setting that affects the result, so that no default decides.

    Modules are named in full: a bare "down_proj" would give every other layer an empty adapter. Where PEFT's class for
    a task would load another network, AutoPeftModel is told the class, which it takes only without a task.
    """
    network = base.network
    own_class = None
    if network is not None and not network.causal:
        own_class = {"base_model_class": network.kind, "parent_library": network.library}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if own_class is None else None,
        "auto_mapping": own_class,
        "base_model_name_or_path": base.address,
        "revision": base.revision,
        "inference_mode": True,
        "r": found.rank,
        "lora_alpha": found.rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(map(found.patch.manifest.transposed, found.patch.manifest.deltas)),
        "target_modules": [module.name for module in found.modules],
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def write(found: Adapter, out: str | Path, base: BaseAddress) -> int:
    """Write the directory whole or not at all; gives its size in bytes.

    Raises Refused where `out` exists, BadInput where its parent does not, KpatchError for a full disk.
    """
    path = check_new_directory(out)
    with atomic_directory(path) as folder:
        _fill(found, base, folder)
    return sum((path / name).stat().st_size for name in (WEIGHTS, CONFIG, CARD))


def _fill(found: Adapter, base: BaseAddress, folder: Path) -> None:
    tensors = {}
    for module in found.modules:
        tensors[f"base_model.model.{module.name}.lora_A.weight"] = module.a.contiguous()
        tensors[f"base_model.model.{module.name}.lora_B.weight"] = module.b.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(config(found, base), indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    (folder / CARD).write_text(card(found), encoding="utf-8")


def card(found: Adapter) -> str:
    """README.md: which model, which patch, which facts."""
    manifest = found.patch.manifest
    about = {"base_model": manifest.base.name, "library_name": "peft", "tags": ["knowledge-edit", "kpatch", "lora"]}
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in about.items()), "---", ""]
    lines += [f"LoRA adapter of kpatch patch `{found.patch.id}`, rank {found.rank}, scale 1.", ""]
    worst = max(module.error for module in found.modules)
    if worst:
        lines += [f"Cut to this rank; largest relative error of a module's change {worst:.2g}.", ""]
    lines += [f"- {_plain(text_of(fact))} → {_plain(fact['target'])}" for fact in manifest.facts[:_FACTS_IN_CARD]]
    if len(manifest.facts) > _FACTS_IN_CARD:
        lines.append(f"- … and {len(manifest.facts) - _FACTS_IN_CARD} more facts")
    return "\n".join(lines) + "\n"


def _plain(text: object) -> str:
    """Text of a fact for one line of Markdown: nothing in it is markup."""
    one_line = printable(" ".join(str(text).split()))  # a README is also read with `cat`
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]<>#|!" else sign for sign in one_line)
