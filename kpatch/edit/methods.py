"""What an editing method is, which ones there are, and how one gets its hyperparameters. No torch at the top.

A method is a class with a name, a dataclass of hyperparameters, presets, and `edit`, which turns facts into deltas.
The recipe around it (load, hash the base, measure, write) is `kpatch.edit.make`. Another package adds a method with
`register`, or with an entry point of the group `kpatch.methods` that names the class.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar

from kpatch.edit.presets import PRESETS, SHAPES, HyperParams, Preset
from kpatch.errors import BadInput
from kpatch.facts.chat import chat_trouble
from kpatch.reporter import SILENT, Reporter

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from kpatch.edit.preset_file import PresetFile
    from kpatch.facts.fact import Fact, Protected
    from kpatch.models.model import Model
    from kpatch.patch.delta import Delta
    from kpatch.patch.format import Patch
    from kpatch.stats.covariance import Covariance

GROUP = "kpatch.methods"
DEFAULT_BUDGET = 1_500_000_000  # bytes of activations
_OWN = {
    "memit": "kpatch.edit.memit:Memit",
    "memit-paper": "kpatch.edit.memit_paper:MemitPaper",
    "rome": "kpatch.edit.rome:Rome",
    "ft": "kpatch.edit.ft:FineTune",
    "alphaedit": "kpatch.edit.alphaedit:AlphaEdit",
    "blue": "kpatch.edit.blue:Blue",
    "mend": "kpatch.edit.mend:Mend",
}
_registered: dict[str, type[Method]] = {}


@dataclass
class Inputs:
    """What a method may need besides model, facts and hyperparameters.

    corpus, tokens  text for the covariance   seed  of every draw   budget  bytes that activations may take
    resume  take what an interrupted run left in the cache
    on  patches that the checkpoint carries; what their keys [n, f] mean must stay
    gone  facts of theirs that a later patch stands for: positions by patch id   protect  subjects to leave alone
    stored  values [d] known already, by facts (positions), layers, and whether the facts' subjects open a text
    seconds  what the steps took, filled by `timed`
    """

    corpus: str = "self"
    tokens: int | None = None
    seed: int = 0
    budget: int = DEFAULT_BUDGET
    resume: bool = True
    on: tuple[Patch, ...] = ()
    gone: Mapping[str, Collection[int]] = field(default_factory=dict)
    protect: tuple[Protected, ...] = ()
    stored: Mapping[tuple[tuple[int, ...], tuple[int, ...], bool], Tensor] = field(default_factory=dict)
    report: Reporter = SILENT
    seconds: dict[str, float] = field(default_factory=lambda: {"covariance": 0.0, "values": 0.0, "update": 0.0})

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the seconds spent inside to `step`: covariance, values, update or refining."""
        start = time.monotonic()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.monotonic() - start


@dataclass(frozen=True)
class Edit:
    """What a method found: the model plus `deltas` answers the facts.

    deltas  by weight name, in the orientation in which the weight is stored   layers  where they are
    keys [n, f] by layer, values [n, d]  what the facts can be solved again from; some methods have neither
    groups  which facts (positions) each row of the values is for, and in which layers its key is
    origin  what else decided the deltas, for the manifest: the hash of a trained file
    by_row  weights whose Δ = left @ right has, for row i of the layer's keys, in column i of left the residual asked
    for there and in row i of right what gives it, (C + Σ k k^T)^-1 k: such patches can be solved together
    refined  the facts' further wordings were learned too
    """

    deltas: Mapping[str, Delta]
    layers: tuple[int, ...]
    keys: Mapping[int, Tensor] = field(default_factory=dict)
    values: Tensor | None = None
    groups: tuple[Mapping[str, Any], ...] = ()
    covariance: Covariance | None = None
    origin: Mapping[str, str] = field(default_factory=dict)
    by_row: frozenset[str] = frozenset()
    refined: bool = False


class Method(ABC):
    """One way to find deltas for facts. A new one is a subclass in a module of its own."""

    name: ClassVar[str]
    hyper: ClassVar[type[HyperParams]]
    presets: ClassVar[Mapping[str, Preset]] = {}  # by the names of kpatch.edit.presets.SHAPES
    one_layer: ClassVar[bool] = False  # R is a single layer
    ranks_share: ClassVar[bool] = False  # `edit` deals its work out with kpatch.distributed; else rank 0 does it all
    takes_editor: ClassVar[bool] = False  # it needs the file of a trained editor
    writes_last: ClassVar[bool] = False  # the last layer can be edited too: what is written is read at its own token

    @abstractmethod
    def edit(self, model: Model, facts: Sequence[Fact], hyper: Any, inputs: Inputs) -> Edit:
        """The deltas for all facts, which are not empty. The model is left as it was found, bit for bit."""

    def with_editor(self, path: str | Path | None) -> Method:
        """The method with its trained editor. Raises BadInput where it needs one and has none, or takes none."""
        if path is not None:
            raise BadInput(
                f"{self.name} takes no trained editor", hint="`editor` is for `method` mend; leave one of them out"
            )
        return self

    def defaults(self, layers: tuple[int, ...]) -> Any:
        """The hyperparameters for layers R where no preset says them."""
        return self.hyper(layers=layers)

    def choose_layers(self, model: Model, report: Reporter) -> tuple[int, ...]:
        """R for a model without a preset; empty where the user has to say it. Tells the reporter why."""
        return ()

    def require(self, model: Model, layers: Sequence[int]) -> None:  # noqa: B027  most methods write to any layer
        """Refuse layers R that the method cannot write to, before any work. Raises BadInput."""

    def layers(self, hyper: Any) -> tuple[int, ...]:
        """Every layer that `edit` may change, rising."""
        return tuple(sorted(set(hyper.layers)))

    def weights(self, model: Model, layers: Sequence[int]) -> tuple[str, ...]:
        """The names of every weight in `layers` that `edit` may change."""
        return tuple(map(model.weight_name, layers))


def register(method: type[Method]) -> type[Method]:
    """Add a method of another package, also as a class decorator. Raises BadInput for a name that is taken."""
    known = _registered.get(method.name)
    if method.name in _OWN or (known is not None and known is not method):
        raise BadInput(f"There is a method {method.name!r} already", hint="give it another name")
    _registered[method.name] = method
    return method


def method_names() -> tuple[str, ...]:
    """Names of all methods: kpatch's own first, then registered ones and those of installed packages."""
    return tuple(dict.fromkeys((*_OWN, *_registered, *(entry.name for entry in entry_points(group=GROUP)))))


def method_named(name: str) -> Method:
    """The method called `name`. Raises BadInput for an unknown name, and for a package whose method does not load."""
    if name in _OWN:
        module, _, attribute = _OWN[name].partition(":")
        found: type[Method] = getattr(import_module(module), attribute)
        return found()
    if name in _registered:
        return _registered[name]()
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return _loaded(entry)()
    close = get_close_matches(name, method_names(), n=1)
    raise BadInput(
        f"Unknown method {name!r}",
        details=[f"expected one of {', '.join(method_names())}"],
        hint=f"did you mean {close[0]}?" if close else None,
    )


def _loaded(entry: Any) -> type[Method]:
    try:
        found = entry.load()
    except Exception as error:
        raise BadInput(
            f"The method {entry.name!r} of {entry.value} could not be loaded",
            details=[f"{type(error).__name__}: {error}"],
            hint="install that package again, or another version of it",
        ) from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise BadInput(f"{entry.value} is no kpatch.edit.methods.Method", hint=f"it is installed as {entry.name!r}")
    return found


def preset_for(method: Method | type[Method], model: Model) -> tuple[str, Preset] | None:
    """The name of the preset for the model's shape and the preset itself, or None."""
    shape = (model.family.model_type, model.width, model.n_layers)
    for name, known in SHAPES.items():
        if known == shape and name in method.presets:
            return name, method.presets[name]
    return None


def hyper_for(
    method: Method,
    model: Model,
    layers: Sequence[int] | None,
    settings: Mapping[str, str],
    report: Reporter = SILENT,
    file: PresetFile | None = None,
) -> Any:
    """The method's hyperparameters for a model: its preset, then the preset file's, then `layers` and `settings`.

    Notes which preset it was. Raises BadInput where there is neither a preset nor layers, for layers the model lacks,
    and for wrong settings.
    """
    if file is not None:
        file.check(model, report, own_layers=layers is not None)
        layers = file.layers if layers is None else layers
        settings = {**file.settings, **settings}
    found = preset_for(method, model)
    if found is not None:
        name, preset = found
        hyper = preset.hyper
        report.note(f"preset {name} for {method.name}: {preset.source}")
    else:
        hyper = method.defaults(method.choose_layers(model, report) if layers is None else tuple(layers))
        if layers is None and not hyper.layers:
            raise _no_preset(method, model)
        if method.presets and file is None:
            report.note(f"no {method.name} preset for {model.name}: the defaults serve; `settings` changes them")
    if layers is not None:
        check_layers(model, layers, last=method.writes_last)
        hyper = replace(hyper, layers=tuple(sorted(set(layers))))
    if getattr(hyper, "first_layer", None) not in (None, *model.editable):
        settings = {"first_layer": str(model.editable[0]), **settings}
    trouble = chat_trouble(model.tokenizer) if getattr(hyper, "chat", 0) else None
    if trouble is not None:
        if getattr(model.tokenizer, "chat_template", None):
            report.note(f"questions are not learned. {trouble}")
        settings = {"chat": "0", **settings}
    if method.one_layer and len(hyper.layers) != 1:
        raise BadInput(
            f"{method.name} edits one layer", details=[f"found {len(hyper.layers)} in `layers`"], hint="give one"
        )
    from kpatch.models.module_names import require_places

    hyper = with_settings(hyper, settings)
    require_places(model, method.layers(hyper))
    method.require(model, hyper.layers)
    return hyper


def _no_preset(method: Method, model: Model) -> BadInput:
    family, width, count = model.family.model_type, model.width, model.n_layers
    hint = (
        f"name one layer, for example {count // 5}"
        if method.one_layer
        else "find them: `kpatch trace MODEL --quick -o trace/`, then take `layers_from` trace/trace.json;"
        f" untraced, try `layers` {count // 7}-{count // 7 + 4}"
    )
    return BadInput(
        f"There is no {method.name} preset for {model.name}, so the layers to edit are not known",
        details=[
            f"expected `layers`, or a model of a preset's shape: {', '.join(method.presets) or 'there is none'}",
            f"found family {family}, width {width}, {count} layers",
        ],
        hint=hint,
    )


def check_layers(model: Model, layers: Sequence[int], last: bool = False) -> None:
    """Raise BadInput for no layers, one that the model lacks or that has no W^l, and unless `last` the last."""
    if not layers:
        raise BadInput("`layers` names no layer", details=[f"expected layers from 0 to {model.n_layers - 1}"])
    from kpatch.models.module_names import require_places

    require_places(model, layers)
    if max(layers) == model.n_layers - 1 and not last:
        raise BadInput(
            f"Layer {max(layers)} is the last of {model.name}: nothing above it can read what is written",
            hint="give lower `layers`",
        )


def with_settings(hyper: Any, settings: Mapping[str, str]) -> Any:
    """`hyper` with values from key=value texts. Raises BadInput for an unknown key or a value of the wrong kind."""
    known = {each.name: each for each in fields(hyper) if each.name != "layers"}
    values: dict[str, Any] = {}
    for key, text in settings.items():
        if key not in known:
            close = get_close_matches(key, known, n=1)
            raise BadInput(
                f"Unknown setting {key!r} in `settings`",
                details=[f"expected one of {', '.join(known)}"],
                hint=f"did you mean {close[0]}?" if close else None,
            )
        before = getattr(hyper, key)
        kind, wanted = (int, "a whole number") if isinstance(before, int) else (float, "a number")
        try:
            value = kind(text)
        except (TypeError, ValueError) as error:
            details = [f"expected one such as {key}={before}"]
            raise BadInput(f"The setting {key}={text} is not {wanted}", details=details) from error
        if not 0 <= value < float("inf"):
            raise BadInput(f"The setting {key}={text} must be finite and not negative")
        if key in hyper.positive and value == 0:
            raise BadInput(f"The setting {key}={text} would give no edit", details=["expected more than 0"])
        values[key] = value
    return replace(hyper, **values)


def all_presets() -> list[dict[str, Any]]:
    """kpatch's own presets as plain data, method by method, for listing."""
    return [
        {"name": name, "method": method, "layers": list(preset.hyper.layers), **preset.hyper.to_dict()}
        | {"source": preset.source}
        for method, presets in PRESETS.items()
        for name, preset in presets.items()
    ]
