"""A GGUF file → a safetensors checkpoint directory in kpatch's cache, converted once."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kpatch.cache import atomic_directory, cache_dir, is_full, lock
from kpatch.errors import BadInput
from kpatch.models.fingerprint import read_sha256
from kpatch.models.quiet import quiet_transformers
from kpatch.reporter import SILENT, Reporter

_MAGIC = b"GGUF"
_DROPPED = (
    "quantization_config",
    "_name_or_path",
    "_model_name_or_path",
)  # what the GGUF file was, and where it lay on this machine


def converted(file: str, sha256: str) -> Path | None:
    """The checkpoint directory that a GGUF file of this name and hash was converted to, if it was."""
    made = cache_dir("models") / f"{Path(file).stem}-{sha256[:16]}"
    return made if (made / "config.json").is_file() else None


def convert(path: Path, *, sha256: str | None = None, report: Reporter = SILENT) -> Path:
    """The checkpoint directory of a GGUF file: float32, one weight file, tokenizer; made now or found in the cache.

    The same file gives the same bytes. Raises BadInput for a file that is not GGUF, that transformers cannot
    read, or where the packages to read it are missing; KpatchError for a full disk.
    """
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise BadInput("The file is not GGUF", where=str(path), details=["expected the bytes GGUF at its start"])
    sha256 = sha256 or read_sha256(path, report)
    made = converted(path.name, sha256)
    if made is not None:
        return made
    _require_readers(path)
    goal = cache_dir("models") / f"{path.stem}-{sha256[:16]}"
    with lock(goal.with_name(goal.name + ".lock"), report=report):
        made = converted(path.name, sha256)  # another process may have made it while this one waited
        return made if made is not None else _convert_into(path, goal, report)


def _convert_into(path: Path, goal: Path, report: Reporter) -> Path:
    with (
        atomic_directory(goal) as folder,
        report.task(f"Converting {path.name} to safetensors", total=4, unit="step") as advance,
    ):
        _write_tokenizer(path, folder)
        advance(1)
        net = _load(path)
        advance(2)
        _write_weights(net, folder)
        advance(1)
    return goal


def _write_tokenizer(path: Path, directory: Path) -> None:
    from transformers import AutoTokenizer

    with _quiet(path):
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        tokenizer.save_pretrained(directory)


def _load(path: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with _quiet(path):
        return AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)


def _write_weights(net: Any, directory: Path) -> None:
    """Weights, config and generation config by hand: save_pretrained refuses a model that came out of GGUF."""
    from safetensors.torch import save_file

    seen: dict[int, str] = {}
    tensors = {}
    for name, tensor in net.state_dict().items():
        if tensor.data_ptr() not in seen:  # a tied lm_head is stored once, under the embeddings' name
            seen[tensor.data_ptr()] = name
            tensors[name] = tensor.contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = net.config.to_diff_dict()
    for key in _DROPPED:
        config.pop(key, None)
    config.update(architectures=[type(net).__name__], dtype="float32", tie_word_embeddings=_tied(net))
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if net.generation_config is not None:
        net.generation_config.save_pretrained(directory)


def _tied(net: Any) -> bool:
    head, embeddings = net.get_output_embeddings(), net.get_input_embeddings()
    return head is not None and bool(head.weight.data_ptr() == embeddings.weight.data_ptr())


def _require_readers(path: Path) -> None:
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise BadInput(
            f"Reading a GGUF file needs the packages {' and '.join(missing)}",
            where=str(path),
            hint="pip install 'kpatch[demo]'",
        )


@contextmanager
def _quiet(path: Path) -> Iterator[None]:
    """Keep the libraries' own bars and warnings off the terminal, and turn their errors into ours."""
    try:
        with quiet_transformers(), redirect_stderr(io.StringIO()):  # the bar over GGUF's tensors heeds no switch
            yield
    except Exception as error:  # whatever the parsers stumble on; the tokenizers' errors have no type of their own
        if is_full(error) or isinstance(error, MemoryError):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput("transformers cannot read this GGUF file", where=str(path), details=[lines[0]]) from error
