"""The file of a trained editor: safetensors with one key of metadata, read with suspicion. docs/editor.md says what
stands in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kpatch.cache import atomic_write
from kpatch.errors import BadInput, Damaged
from kpatch.mend.network import Network, Settings
from kpatch.mend.places import Place, places
from kpatch.models.fingerprint import tokenizer_hash
from kpatch.models.model import Model
from kpatch.outputs import check_new_file
from kpatch.patch.fingerprint import sketch
from kpatch.reporter import SILENT, Reporter
from kpatch.text import printable

FORMAT = 1
_KEY = "kpatch-editor"
_CLOSE = 0.5  # weights further than this from those of training, relative to them, are those of another model
_LARGEST = 1 << 22  # characters of metadata
_HINT = "train one for this model: `kpatch train mend MODEL DATA`"


@dataclass(frozen=True)
class EditorInfo:
    """What an editor's file says of itself; `sha256` is the hash of the whole file.

    `sketches` are 64 values of each edited weight and its norm, as `kpatch.patch.fingerprint.sketch` takes them.
    """

    name: str
    sha256: str
    family: str
    model: str
    tokenizer: str
    places: tuple[Place, ...]
    sketches: tuple[tuple[float, ...], ...]
    settings: Settings
    training: Mapping[str, Any]

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({place.layer for place in self.places}))


@dataclass(frozen=True)
class Editor:
    """A trained editor in memory."""

    info: EditorInfo
    network: Network


def write_editor(
    path: str | Path, model: Model, network: Network, training: Mapping[str, Any], force: bool = False
) -> str:
    """Write an editor whole or not at all; its SHA-256. Equal editors are equal files.

    Raises Refused for a file that exists without `force`, KpatchError where it cannot be written.
    """
    path = check_new_file(path, force=force, what="an editor")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    about = {
        "format": FORMAT,
        "method": "mend",
        "family": model.family.model_type,
        "model": model.name,
        "tokenizer": tokenizer_hash(model.tokenizer),
        "settings": asdict(network.settings),
        "places": [
            {
                **{"name": place.name, "layer": place.layer, "in": place.width_in, "out": place.width_out},
                **{"transposed": place.transposed, "sketch": sketch(model.numbers(place.name))},
            }
            for place in network.places
        ],
        "training": dict(training),
    }
    text = json.dumps(about, sort_keys=True, separators=(",", ":"))
    atomic_write(path, lambda temporary: save_file(tensors, temporary, {_KEY: text}))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_editor(path: str | Path) -> Editor:
    """Read an editor. Raises BadInput for a file that is none, Damaged for one that was cut off or holds NaN."""
    path = Path(path)
    name = printable(path.name, 120)
    if not path.is_file():
        raise BadInput("There is no such editor", where=str(path), hint=_HINT)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        with safe_open(path, framework="pt") as found:
            text = (found.metadata() or {}).get(_KEY)
            if text is None or len(text) > _LARGEST:
                raise _no_editor(path, "it has no description of an editor")
            info = _info(name, digest, json.loads(text))
            if _largest(info) > path.stat().st_size:  # before memory is taken for it
                raise _no_editor(path, "it describes larger matrices than it holds")
            network = Network(info.places, info.settings)
            expected = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
            shapes = {key: tuple(found.get_slice(key).get_shape()) for key in found.keys()}
            if shapes != expected:
                odd = sorted(key for key in {*shapes, *expected} if shapes.get(key) != expected.get(key))
                raise _no_editor(path, f"its tensors are not those that it describes: {printable(odd[0], 80)}")
            tensors = {key: found.get_tensor(key) for key in expected}
    except (SafetensorError, OSError) as error:
        raise Damaged(
            f"{name} cannot be read",
            where=str(path),
            details=[printable(str(error), 200)],
            hint="it was cut off, or is no safetensors file: get it again, or train it again",
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _no_editor(path, printable(f"{type(error).__name__}: {error}", 200)) from None
    _require_finite(path, tensors)
    network.load_state_dict(tensors)
    return Editor(info, network.requires_grad_(False).eval())


def _largest(info: EditorInfo) -> int:
    """Bytes of the largest tensor that a description asks for."""
    settings = info.settings
    sides = [(sum(place.shape), min(settings.rank, sum(place.shape))) for place in info.places]
    squares = [(place.width_in, place.width_in) for place in info.places if settings.covariance]
    return 4 * max(rows * columns for rows, columns in [*sides, *squares])


def _no_editor(path: Path, reason: str) -> BadInput:
    return BadInput(f"{printable(path.name, 120)} is no editor", where=str(path), details=[reason], hint=_HINT)


def _require_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
            raise Damaged(
                f"{printable(path.name, 120)} is damaged",
                where=str(path),
                details=[f"expected finite float32 numbers in {name}", f"found {tensor.dtype}, or NaN or infinity"],
                hint="get it again, or train it again",
            )


def _info(name: str, digest: str, about: Any) -> EditorInfo:
    """The description, checked. Raises ValueError, KeyError or TypeError for one that is wrong."""
    if about["format"] != FORMAT or about["method"] != "mend":
        raise ValueError(f"format {about['format']!r} of {about['method']!r}; this kpatch reads {FORMAT} of 'mend'")
    given = about["settings"]
    regression, covariance = (_among(given.get(key, 0), (0, 1)) for key in ("regression", "covariance"))
    settings = Settings(_count(given["rank"]), float(given["step"]), regression, covariance)
    rows = [(_place(row), tuple(float(number) for number in row["sketch"])) for row in about["places"]]
    if not 0 < len(rows) <= 4096 or len({place.name for place, _ in rows}) != len(rows):
        raise ValueError("places must be there, each once")
    family, model, tokenizer = (about[key] for key in ("family", "model", "tokenizer"))
    if not all(isinstance(text, str) for text in (family, model, tokenizer)) or not isinstance(
        about["training"], dict
    ):
        raise TypeError("family, model and tokenizer must be texts, training an object")
    where, sketches = zip(*rows, strict=True)
    return EditorInfo(name, digest, family, model, tokenizer, where, sketches, settings, about["training"])


def _place(row: Any) -> Place:
    if not isinstance(row["name"], str) or not isinstance(row["transposed"], bool):
        raise TypeError("a place needs a name and whether it is transposed")
    if type(row["layer"]) is not int or row["layer"] < 0:
        raise ValueError("a place needs its layer")
    return Place(row["name"], row["layer"], _count(row["in"]), _count(row["out"]), row["transposed"])


def _count(value: Any) -> int:
    if type(value) is not int or not 0 < value <= 1 << 20:
        raise ValueError(f"expected a width or a rank, found {value!r}")
    return value


def _among(value: Any, known: Sequence[int]) -> int:
    if type(value) is not int or value not in known:
        raise ValueError(f"expected one of {known}, found {value!r}")
    return value


def require_fit(editor: EditorInfo, model: Model, report: Reporter = SILENT) -> None:
    """Refuse an editor for another model. Raises BadInput; notes that the weights were edited since.

    The same matrices must be there, behind the same tokenizer. Their values may differ a little, as those of a
    checkpoint do that carries patches.
    """
    said = f"{editor.name} was trained for {printable(editor.model, 120)} ({printable(editor.family, 40)})"
    here = {
        place.name: place for layer in editor.layers if layer in model.editable for place in places(model, [layer])
    }
    for place in editor.places:
        if here.get(place.name) != place:
            expected = f"{printable(place.name, 120)} [{place.width_out}, {place.width_in}]"
            raise BadInput(
                f"{said}, not for {model.name}", details=[f"expected {expected}, which is not there"], hint=_HINT
            )
    if editor.tokenizer != tokenizer_hash(model.tokenizer):
        raise BadInput(
            f"{said}, not for {model.name}", details=["the tokenizer differs from that of training"], hint=_HINT
        )
    for place, known in zip(editor.places, editor.sketches, strict=True):
        found = torch.tensor(sketch(model.numbers(place.name)))[1:]
        kept = torch.tensor(known)[1:]
        far = float((found - kept).norm() / kept.norm().clamp(min=1e-30)) if len(found) == len(kept) else 1.0
        if not far <= _CLOSE:
            raise BadInput(
                f"{said}, not for {model.name}",
                details=[f"expected the weights of training in {printable(place.name, 120)}, found others"],
                hint=_HINT,
            )
        if far > 0.02:
            report.note(f"{place.name} has changed by {far:.0%} since the editor was trained")
