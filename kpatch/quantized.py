"""Is a checkpoint quantized? By what its config says, by the names of its tensors, or by how they are stored."""

from __future__ import annotations

import re
from collections.abc import Mapping

from kpatch.text import printable

# Tensors that stand in place of or beside `X.weight`, and who writes them.
_TENSORS = (
    (re.compile(r"\.(qweight|qzeros)$"), "GPTQ or AWQ"),
    (re.compile(r"\.weight\.(absmax|quant_map|nested_absmax|quant_state\.bitsandbytes__\w+)$"), "bitsandbytes 4-bit"),
    (re.compile(r"\.(SCB|weight_format)$"), "bitsandbytes 8-bit"),
    (
        re.compile(r"\.(weight_packed|weight_scale|weight_scale_inv|weight_zero_point)$"),
        "compressed or float8",
    ),
    (re.compile(r"\.W_q$"), "HQQ"),
    (re.compile(r"\.weight\._(data|scale|shift)$"), "quanto"),
    (re.compile(r"_proj_(blocks|scales)$"), "MXFP4"),
)
# A float of less than two bytes is a code whoever wrote it. An integer is one where a weight should stand; elsewhere
# it can be a mask or a position. Transformers turns both into ordinary numbers without a word.
_SMALL_FLOAT = re.compile(r"F[1-8]_.*")
_INTEGER = re.compile(r"[IU]\d+|BOOL")
_WEIGHT = re.compile(r"(\.weight|_proj)$")


def quantized_by(config: object, dtypes: Mapping[str, str]) -> str | None:
    """What says that a checkpoint is quantized, printable; None where nothing does.

    `config` is the object of its config.json, `dtypes` the dtype of each tensor by name, as safetensors writes it.
    """
    return _by_config(config) or _by_names(dtypes) or _by_dtypes(dtypes)


def _by_config(config: object) -> str | None:
    for part in (config, config.get("text_config")) if isinstance(config, dict) else ():
        about = part.get("quantization_config") if isinstance(part, dict) else None
        if about:
            method = about.get("quant_method") if isinstance(about, dict) else None
            return printable(str(method or "method unknown"), 160)
    return None


def _by_names(dtypes: Mapping[str, str]) -> str | None:
    for name in dtypes:
        for pattern, method in _TENSORS:
            if pattern.search(name):
                return f"{method}: tensor {printable(name, 100)}"
    return None


def _by_dtypes(dtypes: Mapping[str, str]) -> str | None:
    for name, dtype in sorted(dtypes.items()):
        if _SMALL_FLOAT.fullmatch(dtype) or (_INTEGER.fullmatch(dtype) and _WEIGHT.search(name)):
            return f"tensor {printable(name, 100)} is stored as {printable(dtype, 20)}"
    return None
