"""The adapter as one GGUF file for llama.cpp (`--lora`): blk.N.ffn_down.weight.lora_a and .lora_b, and alpha.

Source: llama.cpp's convert_lora_to_gguf.py and its reader: general.type adapter, adapter.type lora,
adapter.lora.alpha; the scale is alpha over the tensor's rank, which is 1 here.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kpatch.cache import atomic_write
from kpatch.errors import BadInput
from kpatch.export.lora import Adapter, Module
from kpatch.models.families import FAMILIES, choices
from kpatch.outputs import check_new_file
from kpatch.text import printable


def write(found: Adapter, out: str | Path, force: bool = False) -> int:
    """Write the GGUF file whole or not at all; gives its bytes.

    Raises BadInput for a family llama.cpp lacks, for weights other than the MLP's output projection (llama.cpp
    reorders some of those) and where the package gguf is missing; Refused where `out` exists.
    """
    path = Path(out)
    check_new_file(path, force=force, what="a GGUF adapter")
    if find_spec("gguf") is None:
        raise BadInput("Writing GGUF needs the package gguf", hint="pip install 'kpatch[demo]', or pip install gguf")
    named = names(found)
    atomic_write(path, lambda temporary: _write(found, named, temporary))
    return path.stat().st_size


def names(found: Adapter) -> dict[str, Module]:
    """The modules by llama.cpp's name of their weight. Raises BadInput for what it does not have as it is."""
    import gguf

    family = found.patch.manifest.base.family
    architecture = _architecture(family)
    row = FAMILIES[family]
    downs = choices(row.down)
    layers = {module.name: found.patch.manifest.layer_of(module.name) for module in found.modules}
    places = {
        name: next((down for down in downs if name.endswith(f".{layer}.{down}")), None)
        for name, layer in layers.items()
    }
    wrong = [name for name, place in places.items() if place is None]
    if wrong:
        raise BadInput(
            f"Only the MLP's output projection ({' or '.join(downs)}) is known to be in llama.cpp as it is here",
            details=[printable(name, 120) for name in wrong[:10]],
            hint="export it for PEFT, and convert that with llama.cpp's convert_lora_to_gguf.py",
        )
    count = 1 + max(layer for layer in layers.values() if layer is not None)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], count)
    result = {}
    for module in found.modules:
        layer = layers[module.name]
        assert layer is not None
        # The text part's own name: in a model with vision the layers lie deeper
        name = table.get_name(f"{row.layers}.{layer}.{places[module.name]}.weight", try_suffixes=(".weight",))
        if name is None:
            raise BadInput(f"llama.cpp has no name for {printable(module.name, 120)} of this family")
        result[str(name)] = module
    return result


def _architecture(family: str) -> str:
    """The name in gguf's table. Raises BadInput where llama.cpp, or the installed gguf, does not have the family."""
    import gguf

    row = FAMILIES.get(family)
    if row is None or row.gguf is None or not hasattr(gguf.MODEL_ARCH, row.gguf):
        known = sorted(name for name, row in FAMILIES.items() if row.gguf and hasattr(gguf.MODEL_ARCH, row.gguf))
        raise BadInput(
            f"llama.cpp has no architecture for the family {printable(family, 40)}",
            details=[f"expected one of {', '.join(known)}"],
        )
    return row.gguf


def _write(found: Adapter, named: dict[str, Module], path: Path) -> None:
    import gguf

    manifest = found.patch.manifest
    architecture = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[_architecture(manifest.base.family)]]
    writer: Any = gguf.GGUFWriter(str(path), architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(found.rank))
    writer.add_name(f"kpatch {found.patch.id[:12]}")
    for name, module in sorted(named.items()):
        writer.add_tensor(f"{name}.lora_a", module.a.contiguous().numpy())  # [r, in]
        writer.add_tensor(f"{name}.lora_b", module.b.contiguous().numpy())  # [out, r]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
