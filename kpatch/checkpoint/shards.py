"""Which bytes of which file hold a weight: a checkpoint directory's headers, read with limits. No torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kpatch.checkpoint import files
from kpatch.errors import BadInput, Damaged, KpatchError, Refused
from kpatch.patch.canonical_json import JsonError, loads
from kpatch.patch.container import ContainerError, CutOff, Entry, read_container
from kpatch.patch.weight_names import WeightNames
from kpatch.text import printable

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED_INDEX = "pytorch_model.bin.index.json"
# The limit of the safetensors library; checkpoints with many experts have headers of tens of megabytes.
MAX_HEADER = 100_000_000
MAX_JSON = 100_000_000
_BASENAME = re.compile(r"[^/\\:\x00-\x1f]{1,255}")


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where a weight is stored: file name, dtype, shape, bytes [begin, end) of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory: real path, path as given, tensors by stored name, weight files by name.

    `ambiguous` are tensors that two files hold and of which loaders take different ones: the index names one file, but
    transformers reads all files in the order of their names, so the last one counts there.
    """

    path: Path
    given: str
    tensors: dict[str, TensorRef]
    files: tuple[str, ...]
    ambiguous: frozenset[str] = frozenset()

    def find(self, name: str) -> str | None:
        """The stored name of a weight, under another prefix too where loaders know both; None where it has none."""
        return self._names.find(name)

    def why_not(self, name: str) -> str | None:
        """Why no patch can be made for a weight or put onto it, as far as names and files tell; None where one can."""
        stored = self.find(name)
        if stored in self.ambiguous:
            return "it stands in two files: the index names one of them, but transformers reads the other"
        if stored is not None:
            return None
        near = self._names.near(name)
        if near:
            listed = ", ".join(printable(other, 120) for other in near[:3])
            return f"no tensor has that name or one with a prefix that loaders know; found {listed}"
        return "the checkpoint has no tensor of that name"

    @cached_property
    def _names(self) -> WeightNames:
        return WeightNames(self.tensors)


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Read the index and the header of every weight file.

    Raises BadInput for what is no safetensors checkpoint directory, Refused for a GGUF or PyTorch checkpoint or an
    index that points outside, Damaged for a file cut off or an index that does not match its files.
    """
    path, given = real_directory(directory)
    if (path / INDEX).exists():
        listed = read_index(path)
        if (path / SINGLE).exists() and set(listed.values()) != {SINGLE}:
            raise BadInput(
                f"{given} has both {SINGLE} and {INDEX}; loaders would not agree on which holds the weights",
                hint="remove the one that is not meant",
            )
        names = tuple(sorted(set(listed.values())))
    elif (path / SINGLE).exists():
        listed, names = {}, (SINGLE,)
    else:
        raise _no_weights(path, given)
    found: dict[str, dict[str, TensorRef]] = {}
    for file in names:
        for tensor, entry in _read_file(path / file).items():
            ref = TensorRef(file, entry.dtype, entry.shape, entry.begin, entry.end)
            found.setdefault(tensor, {})[file] = ref
    tensors = {tensor: chosen(tensor, refs, listed, given) for tensor, refs in found.items()}
    _check_listed(listed, tensors, path, given)
    ambiguous = frozenset(tensor for tensor, refs in found.items() if tensors[tensor].file != max(refs))
    return Checkpoint(path, given, tensors, names, ambiguous)


def chosen(tensor: str, refs: dict[str, TensorRef], listed: dict[str, str], given: str) -> TensorRef:
    """The one of a tensor's copies that the index names. Raises Damaged where it names none of several."""
    if len(refs) == 1:
        return next(iter(refs.values()))
    if listed.get(tensor) not in refs:
        raise Damaged(
            f"{printable(tensor, 120)} stands in two files of {given}, and the index does not say which one counts",
            details=[" and ".join(refs)],
        )
    return refs[listed[tensor]]


def real_directory(directory: str | Path) -> tuple[Path, str]:
    """The directory with links in its own path resolved, and its printable name as given.

    Raises BadInput, or Refused for a GGUF file.
    """
    given = printable(str(directory))
    try:
        path = Path(os.path.realpath(directory))
        is_dir, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise BadInput(f"{given} cannot be read", details=[str(error)]) from None
    if is_dir:
        return path, given
    if not exists:
        raise BadInput(f"There is no checkpoint directory {given}")
    if path.suffix.lower() == ".gguf":
        raise _is_gguf(given)
    hint = "give the directory that holds it" if path.suffix == ".safetensors" else None
    raise BadInput(f"{given} is a file; patches are applied to a checkpoint directory", hint=hint)


def _is_gguf(given: str) -> Refused:
    return Refused(
        f"{given} is a GGUF checkpoint; its quantized blocks cannot take a patch and give it back exactly",
        hint="apply to the safetensors checkpoint it was made from, or use `kpatch export PATCH --to gguf`",
    )


def _no_weights(path: Path, given: str) -> KpatchError:
    found = files.names(path)
    if only_pickled(path):
        return Refused(
            f"{given} holds PyTorch .bin weights, which cannot be changed in place",
            hint=f"`kpatch apply PATCH {given} -o NEW_DIR` writes a patched copy as safetensors",
        )
    if any(re.fullmatch(r"(pytorch_model|model).*\.(bin|pt|pth)", name) for name in found):
        return Refused(
            f"{given} holds PyTorch weights under names that say not how they belong together",
            details=["expected pytorch_model.bin or pytorch_model.bin.index.json"],
            hint="save it as safetensors first: `AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)`",
        )
    if any(name.lower().endswith(".gguf") for name in found):
        return _is_gguf(given)
    other = [name for name in found if name.endswith(".safetensors")]
    return BadInput(
        f"{given} is no checkpoint directory: it has neither {SINGLE} nor {INDEX}",
        details=[f"other weight files there: {', '.join(printable(name, 80) for name in other[:5])}"] if other else (),
    )


def read_json(path: Path, given: str) -> Any:
    """A JSON file of a checkpoint, with limits. Raises BadInput when it cannot be read, Damaged when it is no JSON."""
    try:
        with files.open_read(path) as handle:
            size = os.fstat(handle.fileno()).st_size
            if size > MAX_JSON:
                raise ContainerError(f"it has {size:,} bytes; the limit is {MAX_JSON:,}")
            return loads(bytes(files.read_at(handle, 0, size)).decode("utf-8"))
    except (OSError, ContainerError) as error:
        raise BadInput(f"{given} cannot be read", details=[printable(str(error), 300)]) from None
    except (JsonError, UnicodeDecodeError) as error:
        raise Damaged(f"{given} is damaged", details=[printable(str(error), 300)]) from None


def only_pickled(path: Path) -> bool:
    """Whether a directory has PyTorch .bin weights where safetensors weights are looked for."""
    here = set(files.names(path))
    return not here & {SINGLE, INDEX} and bool(here & {"pytorch_model.bin", PICKLED_INDEX})


def other_weights(checkpoint: Checkpoint) -> list[str]:
    """Further weight files of a directory, printable: kinds that some loaders take in place of the indexed ones."""
    pattern = re.compile(
        r"(pytorch_model|tf_model|flax_model|consolidated|model).*\.(bin|pth?|h5|msgpack|safetensors)"
    )
    found = [name for name in files.names(checkpoint.path) if pattern.fullmatch(name) and name not in checkpoint.files]
    return [printable(name, 120) for name in found]


def read_index(path: Path, index: str = INDEX, suffix: str = ".safetensors") -> dict[str, str]:
    """The table from tensor to file name of an index file, every name a plain one of a file that is there.

    Raises BadInput, Refused or Damaged as `open_checkpoint`.
    """
    shown = str(path / index)
    value = read_json(path / index, shown)
    listed = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise Damaged(f"{shown} has no weight_map from tensor to file name")
    for name in sorted(set(listed.values())):
        # A plain name only: anything else could lead the writer out of the directory.
        if not _BASENAME.fullmatch(name) or name in (".", "..") or not name.endswith(suffix):
            raise Refused(f"{shown} points outside its directory or to a file of another kind", details=[name])
        if not os.path.lexists(path / name):
            raise BadInput(f"{shown} lists {name}, which is not there", hint="complete the download")
    return listed


def _read_file(path: Path) -> dict[str, Entry]:
    shown = str(path)
    try:
        with files.open_read(path) as handle:
            return read_container(handle, max_header=MAX_HEADER).entries
    except CutOff as error:
        raise Damaged(f"{shown} is cut off", details=[str(error)], hint="download it again") from None
    except ContainerError as error:
        raise Damaged(f"{shown} is not a sound safetensors file", details=[printable(str(error), 300)]) from None
    except OSError as error:
        raise BadInput(f"{shown} cannot be read", details=[str(error)]) from None


def _check_listed(listed: dict[str, str], tensors: dict[str, TensorRef], path: Path, given: str) -> None:
    for tensor, file in listed.items():
        ref = tensors.get(tensor)
        if ref is None and _HEAD.search(tensor) and _ties_its_head(path):
            continue
        if ref is None or ref.file != file:
            where = "in no listed file" if ref is None else f"in {ref.file}"
            raise Damaged(
                f"The index of {given} does not match its files",
                details=[f"{printable(tensor, 120)}: listed in {file}, found {where}"],
            )


# The head, which a model that ties it to its embeddings need not store.
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output)\.weight$")


def _ties_its_head(path: Path) -> bool:
    """Whether the head may be the embeddings: config.json does not deny it.

    In a model with vision the whole says it, and the text part only where the whole does not.
    """
    config = path / "config.json"
    value = read_json(config, str(config)) if config.is_file() else {}
    parts = [value, value.get("text_config")] if isinstance(value, dict) else []
    said = [part["tie_word_embeddings"] for part in parts if isinstance(part, dict) and "tie_word_embeddings" in part]
    return not said or said[0] is not False


def has_adapter(path: Path) -> bool:
    """Whether a LoRA adapter lies beside the weights; transformers loads it on top of them where PEFT is installed."""
    return (path / "adapter_config.json").is_file()
