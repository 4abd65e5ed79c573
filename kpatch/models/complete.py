"""Whether the files of a checkpoint can be read, and every weight of a loaded network came out, whole and finite."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kpatch.errors import BadInput
from kpatch.models.address import weight_files
from kpatch.models.offload import read
from kpatch.models.text_part import text_config
from kpatch.quantized import quantized_by
from kpatch.text import counted, printable

_SHOWN = 5  # names in one message


def require_complete(net: Any, loaded: Mapping[str, Any], name: str, where: str) -> None:
    """Refuse a network with weights that transformers made up, could not fit, or that are not numbers.

    `loaded` is what from_pretrained answers with output_loading_info. A tied weight is stored under its other name
    and is no hole. Raises BadInput with the number and the first names.
    """
    wrong = sorted(loaded.get("mismatched_keys") or [])
    if wrong:
        raise BadInput(
            _weights(wrong, name, "does not have the shape", "do not have the shape") + " that config.json says",
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
            _weights(missing, name, "is not in its checkpoint", "are not in its checkpoint"),
            where=where,
            details=details,
            hint="copy or download the checkpoint again, with the config.json that belongs to it",
        )
    dropped = _biases_beyond(net, loaded.get("unexpected_keys") or [])
    if dropped:
        raise BadInput(
            f"The checkpoint of {name} holds biases where config.json says that there are none",
            where=where,
            details=[f"no place for {key}" for key in dropped[:_SHOWN]],
            hint="give the config.json that belongs to these weights",
        )
    broken = [key for key, _ in net.named_parameters() if not _finite(read(net, key))]
    if broken:
        raise BadInput(
            _weights(broken, name, "holds NaN or infinity", "hold NaN or infinity"),
            where=where,
            details=broken[:_SHOWN],
            hint="copy or download the checkpoint again",
        )


def _weights(keys: Sequence[Any], name: str, one: str, several: str) -> str:
    return f"{counted(len(keys), 'weight')} of {name} {one if len(keys) == 1 else several}"


def require_unquantized(folder: Path, name: str) -> None:
    """Refuse quantized and complex weights by the config and the files' headers, before anything is loaded.

    transformers would make ordinary numbers of them without a word. Raises BadInput; files that cannot be read
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
    imaginary = sorted(key for key, dtype in dtypes.items() if dtype.startswith("C"))
    if imaginary:
        raise BadInput(
            f"{name} holds complex numbers, and of them only the real part would be loaded",
            where=str(folder),
            details=[f"{printable(imaginary[0], 100)} is stored as {dtypes[imaginary[0]]}"],
            hint="copy or download the checkpoint again",
        )


def read_config(path: str, name: str) -> Any:
    """The transformers configuration of a checkpoint directory. Raises BadInput where transformers refuses it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # whatever the code of this or that family makes of a number that makes no sense
        raise _unread(name, path, "config.json", error) from error


def read_tokenizer(path: str, name: str) -> Any:
    """The tokenizer of a checkpoint directory. Raises BadInput where its files are damaged."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise _unread(name, path, "the tokenizer's files", error) from error


def _unread(name: str, path: str, what: str, error: Exception) -> BadInput:
    return BadInput(
        f"{name} could not be loaded: {what} cannot be read",
        where=path,
        details=[_reason(error)],
        hint="copy them again from the model's original directory",
    )


def unbuilt(name: str, path: str, error: Exception) -> BadInput:
    """What to raise where transformers cannot build the network that config.json describes, or fill it."""
    return BadInput(
        f"{name} could not be loaded",
        where=path,
        details=[_reason(error)],
        hint="look at that setting in config.json, or copy or download the checkpoint again",
    )


def _reason(error: Exception) -> str:
    """What transformers says, in one line: of several the last that is no advice to install something."""
    if isinstance(error, KeyError) and error.args:
        return f"{error.args[0]!r} is not known to transformers, or not there"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "pip install" not in line]
    kind = type(error).__name__
    return f"{kind}: {(told or lines)[-1]}" if lines else kind


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


def _biases_beyond(net: Any, unexpected: Iterable[str]) -> list[str]:
    """Stored biases of linear modules that the network has without one: transformers drops them without a word."""
    bare = {name for name, module in net.named_modules() if hasattr(module, "bias") and module.bias is None}
    ends = {name.split(".", 1)[-1] for name in bare} | bare  # checkpoints may leave out the base model's prefix
    return [key for key in sorted(unexpected) if key.endswith(".bias") and key.removesuffix(".bias") in ends]


def _names(net: Any) -> dict[str, set[str]]:
    """All names of each weight that has several: one of them is stored, and stands for the others."""
    found: dict[int, set[str]] = {}
    for name, weight in net.named_parameters(remove_duplicate=False):
        found.setdefault(id(weight), set()).add(name)
    return {name: several for several in found.values() if len(several) > 1 for name in several}


def _finite(weight: torch.Tensor) -> bool:
    # A sum of finite numbers can overflow, but a sum that is finite has no NaN and no infinity among them
    return bool(torch.isfinite(weight.detach().sum(dtype=torch.float32))) or bool(torch.isfinite(weight).all())
