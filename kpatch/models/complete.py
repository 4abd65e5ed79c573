"""Whether the files of a checkpoint can be read, and every weight of a loaded network came out, whole and finite."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kpatch.errors import BadInput
from kpatch.models.address import weight_files
from kpatch.models.text_part import text_config
from kpatch.quantized import quantized_by

_SHOWN = 5  # names in one message


def require_complete(net: Any, loaded: Mapping[str, Any], name: str, where: str) -> None:
    """Refuse a network with weights that transformers made up, could not fit, or that are not numbers.

    `loaded` is what from_pretrained answers with output_loading_info. A tied weight is stored under its other name
    and is no hole. Raises BadInput with the number and the first names.
    """
    wrong = sorted(loaded.get("mismatched_keys") or [])
    if wrong:
        raise BadInput(
            f"{len(wrong)} weights of {name} do not have the shape that config.json says",
            where=where,
            details=[
                f"{key}: expected {list(expected)}, found {list(found)}" for key, found, expected in wrong[:_SHOWN]
            ],
            hint="give the config.json that belongs to these weights",
        )
    beyond = _layers_beyond(net, loaded.get("unexpected_keys") or [])
    if beyond:
        raise BadInput(
            f"The checkpoint of {name} holds more layers than config.json says",
            where=where,
            details=[f"no place for {key}" for key in beyond[:_SHOWN]],
            hint="give the config.json that belongs to these weights",
        )
    absent = set(loaded.get("missing_keys") or [])
    names = _names(net)
    missing = sorted(key for key in absent if names.get(key, {key}) <= absent)
    if missing:
        unknown = sorted(loaded.get("unexpected_keys") or [])
        details = [f"missing {key}" for key in missing[:_SHOWN]]
        if len(missing) > _SHOWN:
            details.append(f"… and {len(missing) - _SHOWN} more")
        if unknown:
            details.append(f"found {unknown[0]}, which the model has no place for ({len(unknown)} such)")
        raise BadInput(
            f"{len(missing)} weights of {name} are not in its checkpoint",
            where=where,
            details=details,
            hint="copy or download the checkpoint again, with the config.json that belongs to it",
        )
    broken = [key for key, weight in net.named_parameters() if not _finite(weight)]
    if broken:
        raise BadInput(
            f"{len(broken)} weights of {name} hold NaN or infinity",
            where=where,
            details=broken[:_SHOWN],
            hint="copy or download the checkpoint again",
        )


def require_unquantized(folder: Path, name: str) -> None:
    """Refuse quantized weights by the config and the headers of the weight files, before anything is loaded.

    transformers would make ordinary numbers of bare codes without a word. Raises BadInput; files that cannot be read
    are left to what reads them next.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    dtypes: dict[str, str] = {}
    for file in weight_files(folder):
        try:
            with safe_open(folder / file, framework="pt") as weights:
                dtypes |= {key: weights.get_slice(key).get_dtype() for key in weights.keys()}
        except (SafetensorError, OSError):
            continue
    why = quantized_by(config, dtypes)
    if why is not None:
        raise BadInput(
            f"{name} holds quantized weights, which cannot be edited ({why})",
            where=str(folder),
            hint="make the patch for the unquantized checkpoint",
        )


def read_config(path: str, name: str) -> Any:
    """The transformers configuration of a checkpoint directory. Raises BadInput where transformers refuses it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise _unread(name, path, "config.json", error) from error


def read_tokenizer(path: str, name: str) -> Any:
    """The tokenizer of a checkpoint directory. Raises BadInput where its files are damaged."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise _unread(name, path, "the tokenizer's files", error) from error


def _unread(name: str, path: str, what: str, error: Exception) -> BadInput:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
    return BadInput(
        f"{name} could not be loaded: {what} cannot be read",
        where=path,
        details=[reason],
        hint="copy them again from the model's original directory",
    )


def damaged_weights(folder: Path, name: str, error: SafetensorError) -> BadInput:
    """What to raise for a weight file that safetensors cannot open; names the first such file."""
    found = "*.safetensors"
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError):
            found = file.name
            break
    return BadInput(
        f"A weight file of {name} is cut off or damaged",
        where=str(folder),
        details=[f"{found}: {error}"],
        hint="copy or download the checkpoint again",
    )


def _layers_beyond(net: Any, unexpected: Iterable[str]) -> list[str]:
    """Weights of layers behind the network's last one, but for those that only guess tokens ahead (DeepSeek's MTP)."""
    numbered = re.compile(r"(.*\.(?:layers|h|blocks))\.(\d+)\.")
    counts: dict[str, int] = {}
    for key in net.state_dict():
        if found := numbered.match(key):
            counts[found[1]] = max(counts.get(found[1], 0), int(found[2]) + 1)
    ahead = int(getattr(text_config(net.config), "num_nextn_predict_layers", 0) or 0)
    places = ((key, numbered.match(key)) for key in sorted(unexpected))
    return [key for key, at in places if at and at[1] in counts and int(at[2]) >= counts[at[1]] + ahead]


def _names(net: Any) -> dict[str, set[str]]:
    """All names of each weight that has several: one of them is stored, and stands for the others."""
    found: dict[int, set[str]] = {}
    for name, weight in net.named_parameters(remove_duplicate=False):
        found.setdefault(id(weight), set()).add(name)
    return {name: several for several in found.values() if len(several) > 1 for name in several}


def _finite(weight: torch.Tensor) -> bool:
    # A sum of finite numbers can overflow, but a sum that is finite has no NaN and no infinity among them
    return bool(torch.isfinite(weight.detach().sum(dtype=torch.float32))) or bool(torch.isfinite(weight).all())
