"""Second moments and sampled text on disk: one folder for each model, text and setting, one file for each layer."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kpatch.cache import atomic_write, cache_dir, is_full, lock
from kpatch.errors import BadInput, KpatchError
from kpatch.reporter import Reporter
from kpatch.stats.moment import SecondMoment
from kpatch.text import format_size

FORMAT = 1
_Value = TypeVar("_Value")


@dataclass
class LayerSums:
    """The sums of one layer so far: `sums` over its first `rows` rows, taken in batches of `batch_rows`.

    `tail` is what a finished count of tokens has beyond whole batches. It is kept apart, since growing to more tokens
    takes those rows again in a whole batch: only so does growing give the same bits as starting with more.
    """

    layer: int
    sums: SecondMoment
    batch_rows: int
    rows: int = 0
    tail: SecondMoment | None = None

    def moment(self) -> SecondMoment:
        return self.sums if self.tail is None else self.sums.merge(self.tail)


def canonical(value: Any) -> str:
    """JSON with one spelling for each value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


class StatisticsCache:
    """The folder for one set of settings: all that decides keys but the layer and how many tokens.

    Every file is written whole or not at all and carries the SHA-256 of its content. One that does not match is
    removed with a warning, and its content computed again. With `keep` false nothing is read or written.
    """

    def __init__(self, settings: Mapping[str, Any], about: Mapping[str, Any], *, keep: bool, report: Reporter) -> None:
        self.key = hashlib.sha256(canonical(settings).encode()).hexdigest()
        self.about = {**about, "settings": dict(settings), "format": FORMAT}
        self.report = report
        self.folder = cache_dir("covariance", self.key[:32]) if keep else None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process collects; another waits for it and finds the result."""
        if self.folder is None:
            yield
            return
        with lock(self.folder / "lock", report=self.report):
            yield

    def finished(self, layer: int, tokens: int, width: int) -> LayerSums | None:
        """The state kept for exactly `tokens` tokens."""
        return self._state(_finished(layer, tokens), layer, width)

    def has_layer(self, layer: int, tokens: int) -> bool:
        """Whether a state for exactly `tokens` tokens is there; it is not read."""
        return self.folder is not None and (self.folder / _finished(layer, tokens)).exists()

    def furthest(self, layer: int, width: int, batch_rows: int, most: int) -> LayerSums | None:
        """The state to resume from: the most rows, up to `most`, taken in the same batches; its tail is dropped."""
        if self.folder is None:
            return None
        best: LayerSums | None = None
        for path in sorted(self.folder.glob(f"layer-{layer}-*.safetensors")):
            rows, taken_in = self._read(path, _progress) or (0, 0)
            if taken_in == batch_rows and (best.rows if best else 0) < rows <= most:
                best = self._state(path.name, layer, width) or best
        if best is not None:
            best.tail = None
        return best

    def write(self, state: LayerSums, tokens: int | None = None) -> None:
        """Keep a state: as finished for `tokens` tokens, or as far as it got. Raises BadInput for a full disk."""
        if self.folder is None:
            return
        tensors = state.sums.to_tensors()
        if state.tail is not None and tokens is not None:
            tensors |= state.tail.to_tensors("tail.")
        about = {"layer": state.layer, "tokens": tokens, "rows": state.rows, "batch_rows": state.batch_rows}
        name = _partial(state.layer) if tokens is None else _finished(state.layer, tokens)
        self._write(self.folder / name, tensors, about)
        if tokens is not None:
            (self.folder / _partial(state.layer)).unlink(missing_ok=True)

    def save_progress(self, states: list[LayerSums]) -> float:
        """Keep unfinished states; the seconds it took. A full disk gives only a warning: it may have room later."""
        begin = time.monotonic()
        try:
            for state in states:
                self.write(state)
        except KpatchError as error:
            self.report.warn(f"The work so far could not be kept: {error.message}")
        return time.monotonic() - begin

    def group(self, number: int, make: Callable[[], Tensor]) -> Tensor:
        """Sampled group `number`, [G, T] int32: kept, or made by `make` and kept."""
        if self.folder is None:
            return make()
        path = self.folder / f"text-{number}.safetensors"
        if path.exists():
            kept = self._read(path, lambda _, tensors: tensors["ids"])
            if kept is not None:
                return kept
        ids = make()
        self._write(path, {"ids": ids}, {"group": number})
        return ids

    def has_group(self, number: int) -> bool:
        return self.folder is not None and (self.folder / f"text-{number}.safetensors").exists()

    def kept(self, name: str, build: Callable[[dict[str, Any], dict[str, Tensor]], _Value]) -> _Value | None:
        """What `build` makes of another statistic's file `name`, its notes and its tensors; None where there is none.

        A KeyError or ValueError of `build` says that the file is damaged.
        """
        if self.folder is None or not (self.folder / name).exists():
            return None
        return self._read(self.folder / name, build)

    def keep(self, name: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Keep another statistic on the same text as file `name`. Raises BadInput for a full disk."""
        if self.folder is not None:
            self._write(self.folder / name, tensors, about)

    def require_space(self, width: int, moments: int) -> None:
        """Raise BadInput before the work, not after it, when `moments` more of them would not fit on the disk."""
        if self.folder is None:
            return
        needed = (moments + 1) * width * (width + 1) // 2 * 8  # one more while a file takes another's place
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise BadInput(
                "No space left on the disk for the covariance",
                where=str(self.folder),
                details=[
                    f"expected {format_size(needed)} for sums over {width} units",
                    f"found {format_size(free)} free",
                ],
                hint="free some space, or set KPATCH_CACHE to a folder on another disk",
            )

    def _state(self, name: str, layer: int, width: int) -> LayerSums | None:
        if self.folder is None or not (self.folder / name).exists():
            return None

        def build(about: dict[str, Any], tensors: dict[str, Tensor]) -> LayerSums:
            sums = SecondMoment.from_tensors(tensors)
            tail = SecondMoment.from_tensors(tensors, "tail.") if "tail.total" in tensors else None
            if about["layer"] != layer or any(part.width != width for part in (sums, tail) if part is not None):
                raise ValueError("it holds another layer")
            return LayerSums(layer, sums, int(about["batch_rows"]), int(about["rows"]), tail)

        return self._read(self.folder / name, build)

    def _read(self, path: Path, build: Callable[[dict[str, Any], dict[str, Tensor]], _Value]) -> _Value | None:
        """What `build` makes of a file; None for a damaged one, which is removed with a warning."""
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["kpatch"])
                if build is _progress:
                    return build(about, {})
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            if about.pop("sha256") != _sha256(about, tensors):
                raise ValueError("its content does not match its checksum")
            return build(about, tensors)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            self.report.warn(f"{path.name} in the covariance cache is damaged ({reason}): collecting it again")
            with suppress(OSError):
                path.unlink()
            return None

    def _write(self, path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        about = {**self.about, **about}
        notes = {"kpatch": canonical({**about, "sha256": _sha256(about, tensors)})}
        try:
            atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata=notes))
        except KpatchError as error:
            if is_full(error.__cause__ or error):
                raise BadInput(
                    "No space left on the disk for the covariance", where=str(path), hint=error.hint
                ) from error
            raise


def _progress(about: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[int, int]:
    """Rows, and the batches they were taken in: from the header, without reading the sums."""
    return int(about["rows"]), int(about["batch_rows"])


def _finished(layer: int, tokens: int) -> str:
    return f"layer-{layer}-tokens-{tokens}.safetensors"


def _partial(layer: int) -> str:
    return f"layer-{layer}-partial.safetensors"


def _sha256(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(canonical(about).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
