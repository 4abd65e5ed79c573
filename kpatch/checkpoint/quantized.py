"""Is a checkpoint quantized? By what its config says, or by the names quantizers give to tensors. No torch."""

from __future__ import annotations

import re

from kpatch.checkpoint.shards import Checkpoint, read_json
from kpatch.errors import Refused
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


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise Refused for a quantized checkpoint, with the reason and the way."""
    method = _by_config(checkpoint) or _by_tensors(checkpoint)
    if method is not None:
        raise Refused(
            f"{checkpoint.given} is quantized ({printable(method, 160)})",
            details=[
                "its weights are stored as codes and scales; adding a change to them would not give what was meant"
            ],
            hint="apply to the unquantized checkpoint, and quantize that again",
        )


def _by_config(checkpoint: Checkpoint) -> str | None:
    config = checkpoint.path / "config.json"
    value = read_json(config, str(config)) if config.exists() else {}
    for part in (value, value.get("text_config")) if isinstance(value, dict) else ():
        about = part.get("quantization_config") if isinstance(part, dict) else None
        if about:
            return str(about.get("quant_method") or "method unknown") if isinstance(about, dict) else "method unknown"
    return None


def _by_tensors(checkpoint: Checkpoint) -> str | None:
    for name in checkpoint.tensors:
        for pattern, method in _TENSORS:
            if pattern.search(name):
                return f"{method}: tensor {printable(name, 100)}"
    return None
