"""A checkpoint directory → a network in memory with its tokenizer and its family's row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from kpatch.errors import BadInput, KpatchError
from kpatch.facts.tokens import require_fast
from kpatch.models.address import Resolved, resolve
from kpatch.models.complete import (
    damaged_weights,
    read_config,
    read_tokenizer,
    require_complete,
    require_unquantized,
    unbuilt,
)
from kpatch.models.families import Family, choices, family_for, require_editable, require_own_code
from kpatch.models.fingerprint import weight_files
from kpatch.models.mixed_precision import MIXED, mixes
from kpatch.models.module_names import fit_names, require_any_place
from kpatch.models.offload import main_device, prepare, read
from kpatch.models.placement import Limits, device_named, dtype_named, limits_checked, spread
from kpatch.models.quiet import quiet_transformers
from kpatch.models.residual_scale import measured_scale
from kpatch.models.text_part import loader, text_config
from kpatch.reporter import SILENT, Reporter

# Where PEFT is installed, transformers puts an adapter that lies beside the weights on top of them. It looks for one
# in the folder that it is told, and there is none in this one.
_NO_ADAPTER = ".kpatch/no-adapter"


@dataclass(eq=False)
class Model:
    """A causal language model ready for editing: frozen, in evaluation mode, with its family's module names.

    Dimensions: width d, mlp_width f, n_layers L. `editable` are the layers that have a W^l: all but mixtures of
    experts without a shared expert.
    """

    net: Any
    tokenizer: Any
    family: Family
    name: str = "model"
    revision: str | None = None
    path: Path | None = None
    weights_id: str | None = None  # names the weights where they are not those of the files
    mixed: bool = False  # work that stands it may multiply in bfloat16: see `kpatch.models.mixed_precision`

    @property
    def device(self) -> torch.device:
        """Where ids go in, states pass between layers and logits come out."""
        return main_device(self.net)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight(self.editable[0]).dtype

    @property
    def precision(self) -> str:
        """What this model's results are computed in, as `load_model` calls it: mixed, float32, bfloat16 or float16."""
        return MIXED if self.mixed else str(self.dtype).removeprefix("torch.")

    @property
    def config(self) -> Any:
        """The configuration of the text part."""
        return text_config(self.net.config)

    @cached_property
    def layers(self) -> nn.ModuleList:
        return self.net.get_submodule(self.family.layers)  # type: ignore[no-any-return]

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def width(self) -> int:
        return int(self.config.hidden_size)

    @cached_property
    def editable(self) -> tuple[int, ...]:
        return tuple(index for index in range(self.n_layers) if self._has(index, self.family.down))

    def key_width(self, index: int) -> int:
        """f of layer `index`: a shared expert is narrower than a dense MLP."""
        rows, cols = self.weight(index).shape
        return int(rows if self.stores_transposed else cols)

    @cached_property
    def mlp_width(self) -> int:
        """The largest f of any layer."""
        return max(self.key_width(index) for index in self.editable)

    @property
    def stores_transposed(self) -> bool:
        """True when W is stored [in, out] (GPT-2) instead of [out, in]."""
        return self.family.transposed

    def layer(self, index: int) -> nn.Module:
        return self.layers[index]

    def _part(self, index: int, name: str) -> tuple[str, nn.Module]:
        """The module of a layer that a name of the family's row stands for, and which of its choices it is."""
        several = choices(name)
        for choice in several:
            try:
                return choice, self.layers[index].get_submodule(choice)
            except AttributeError:
                continue
        raise AttributeError(f"layer {index} has no {' or '.join(several)}")

    def _has(self, index: int, name: str) -> bool:
        try:
            self._part(index, name)
        except AttributeError:
            return False
        return True

    def down(self, index: int) -> nn.Module:
        """The MLP's output projection of layer `index`: W^l."""
        return self._part(index, self.family.down)[1]

    def mlp(self, index: int) -> nn.Module:
        """The module around W^l: the MLP itself, which treats each token by itself."""
        name = self._part(index, self.family.down)[0].rpartition(".")[0]
        return self.layers[index].get_submodule(name)

    def mlp_out(self, index: int) -> nn.Module:
        """The module whose output is m^l, what the MLP adds to the residual stream."""
        return self._part(index, self.family.mlp_out)[1]

    def attn_out(self, index: int) -> nn.Module:
        """The module whose output is a^l, what attention adds to the residual stream."""
        return self._part(index, self.family.attn_out)[1]

    def weight(self, index: int) -> Tensor:
        """W^l as it is stored."""
        return self.down(index).weight  # type: ignore[return-value]

    def weight_name(self, index: int) -> str:
        """The name of W^l in the checkpoint."""
        return f"{self.family.layers}.{index}.{self._part(index, self.family.down)[0]}.weight"

    def numbers(self, name: str) -> Tensor:
        """A weight by its name in the network, loaded where it is offloaded. Not to be changed: see `offload`."""
        return read(self.net, name)

    @property
    def adds_bos(self) -> bool:
        """True when the tokenizer puts a special token in front of every text."""
        return (
            bool(self.tokenizer("a").input_ids) and self.tokenizer("a").input_ids[0] in self.tokenizer.all_special_ids
        )

    @property
    def pad_id(self) -> int:
        """An id to fill padded columns with; they are masked, so any id of the vocabulary serves."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id or 0)

    @cached_property
    def returns_tuple(self) -> bool:
        """True when the network takes [0] of what a layer returns."""
        handle = self.layer(0).register_forward_hook(_stop)
        try:
            with torch.no_grad():
                self.net(input_ids=torch.full((1, 1), self.pad_id, device=self.device), use_cache=False)
        except _StoppedError as stopped:
            return isinstance(stopped.out, (tuple, list))
        finally:
            handle.remove()
        raise AttributeError("the network does not call its first layer")

    @contextmanager
    def layers_replaced(self, stands_in: Callable[..., Tensor]) -> Iterator[None]:
        """While open, the network calls `stands_in(index, hidden, *args, **kwargs)` in place of each layer."""
        originals = [layer.__dict__.get("forward") for layer in self.layers]
        as_tuple = self.returns_tuple

        def call(index: int) -> Callable[..., Any]:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                out = stands_in(index, hidden_states, *args, **kwargs)
                return (out, None) if as_tuple else out

            return forward

        for index, layer in enumerate(self.layers):
            layer.forward = call(index)
        try:
            yield
        finally:
            for layer, original in zip(self.layers, originals, strict=True):
                if original is None:
                    del layer.forward
                else:
                    layer.forward = original

    def logits(self, hidden: Tensor) -> Tensor:
        """What the network makes of hidden [..., d] that leaves its last layer: logits [..., V].

        The network's own code runs, with `hidden` in place of what its layers give: whatever it does behind them
        (norm, projection, head, scale, cap) is written nowhere else. Each vector is a row of one token, so that
        masks and positions cost next to nothing.
        """
        rows = hidden.reshape(-1, 1, hidden.shape[-1])  # (M, 1, d)
        ids = torch.full((len(rows), 1), self.pad_id, device=hidden.device)

        def given(index: int, state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return rows if index == self.n_layers - 1 else state

        with self.layers_replaced(given):
            logits: Tensor = self.net(input_ids=ids, use_cache=False).logits
        return logits.view(*hidden.shape[:-1], -1)

    @cached_property
    def _residual_scales(self) -> dict[int, float | None]:
        return {}

    def _scale(self, index: int) -> float | None:
        known = self._residual_scales
        if index not in known:
            known[index] = measured_scale(self, index)
        return known[index]

    def residual_scale(self, index: int) -> float:
        """s, where m^l joins the residual stream as s · m^l: 1 in most families, 0.22 in Granite.

        Raises BadInput for a layer where it differs from token to token: see `gated`.
        """
        scale = self._scale(index)
        if scale is None:
            raise BadInput(
                f"Layer {index} of {self.name} multiplies its shared expert's output by a gate, by another number for"
                " each token",
                details=["this method divides by that number, and needs it to be the same for all"],
                hint="`method` memit finds its writes with the gate in place",
            )
        return scale

    def gated(self, index: int) -> bool:
        """True where layer `index` multiplies what W^l puts out by a number of the token's own (Qwen's experts)."""
        return self._scale(index) is None

    def behind_down(self, index: int) -> bool:
        """True where a norm or a gate stands behind W^l, so that what is asked for is said of what W^l puts out."""
        return self.family.post_norm or self.gated(index)


class _StoppedError(Exception):
    """Ends a forward pass with what a layer returned."""

    def __init__(self, out: Any) -> None:
        self.out = out


def _stop(module: nn.Module, inputs: Any, out: Any) -> None:
    raise _StoppedError(out)


def require_loaded(model: object) -> None:
    """Raise BadInput where a Model is expected and something else was given: an address, say, or a bare network."""
    if not isinstance(model, Model):
        raise BadInput(f"`model` is a {type(model).__name__}, not a loaded Model", hint="kpatch.load_model gives one")


def open_model(
    address: str | Path | Resolved,
    *,
    device: str = "auto",
    dtype: str = "auto",
    modules: dict[str, str] | None = None,
    max_memory: Limits = None,
    upto: int | None = None,
    report: Reporter = SILENT,
) -> Model:
    """Find the model called `address`, unless that is done, report what it came to, and load it for editing.

    Raises BadInput and Damaged as `resolve` and `load_model` do.
    """
    resolved = address if isinstance(address, Resolved) else resolve(address, report)
    report.note(resolved.said)
    if (resolved.path / "adapter_config.json").is_file():
        report.note(f"{resolved.name} holds an adapter beside its weights; the patch is for the weights alone")
    with report.task(f"Loading {resolved.name}"):
        return load_model(
            resolved, device=device, dtype=dtype, modules=modules, max_memory=max_memory, upto=upto, report=report
        )


def load_model(
    resolved: Resolved,
    *,
    device: str = "auto",
    dtype: str = "auto",
    modules: dict[str, str] | None = None,
    max_memory: Limits = None,
    upto: int | None = None,
    report: Reporter = SILENT,
) -> Model:
    """Load a checkpoint directory for editing.

    `dtype` auto is the checkpoint's own on a GPU and float32 on a CPU, or mixed (`kpatch.models.mixed_precision`).
    A model that is larger than the device, or than `max_memory` (bytes for its weights on each device, or by device),
    is spread over devices, memory and disk (`kpatch.models.placement`); layers above `upto` are then left on the
    disk, since they will not be run.
    Raises BadInput for an unknown family, a tokenizer without offsets or of another vocabulary, a bad device, one
    that the model does not fit on, and where accelerate is needed and not installed.
    """
    where, limits = device_named(device), limits_checked(max_memory)
    path = str(resolved.path)
    require_own_code(resolved.path, resolved.name)
    require_unquantized(resolved.path, resolved.name)
    try:
        with quiet_transformers():
            config = read_config(path, resolved.name)
            require_editable(config, resolved.name, modules is not None)
            text = text_config(config)
            family = family_for(text.model_type, modules)
            if (getattr(text, "num_kv_shared_layers", 0) or 0) > 0:
                raise BadInput(
                    f"Layers of {resolved.name} share their keys and values, so that none of them can be run alone",
                    details=["Gemma 4 models without shared layers can be edited"],
                )
            require_any_place(config, family, resolved.name)
            tokenizer = read_tokenizer(path, resolved.name)
            number = dtype_named(dtype, where)
            stored = sum(file.stat().st_size for file in weight_files(resolved.path) if file.is_file())
            places = spread(config, family, where, number, device, limits, resolved.name, upto, stored)
            net, loaded = loader(config).from_pretrained(
                path,
                dtype=number,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                adapter_kwargs={"subfolder": _NO_ADAPTER},
                **({} if places is None else places.arguments()),
            )
        require_complete(net, loaded, resolved.name, path)
        if places is None:
            net = net.to(where)
        else:
            prepare(net)
            report.note(f"{resolved.name} is spread: {places.said}")
    except torch.OutOfMemoryError as error:
        raise BadInput(
            f"{resolved.name} is larger than the memory of {where}",
            where=path,
            details=["the weights fit, but not what runs beside them" if places else "it was free when loading began"],
            hint="`max_memory` keeps weights off the device; `dtype` bfloat16 takes half of float32",
        ) from error
    except SafetensorError as error:
        raise damaged_weights(resolved.path, resolved.name, error) from error
    except (KpatchError, MemoryError):
        raise
    except Exception as error:  # the code of some hundred families raises all kinds
        raise unbuilt(resolved.name, path, error) from error
    model = wrap(net, tokenizer, family, name=resolved.name, revision=resolved.revision, path=resolved.path)
    model.mixed = places is None and mixes(model, dtype, where)
    return model


def wrap(net: Any, tokenizer: Any, family: Family | None = None, **about: Any) -> Model:
    """A Model around a network and tokenizer already in memory.

    Raises BadInput where the family's module names are not found or the tokenizer does not match.
    """
    text = text_config(net.config)
    family = family or family_for(text.model_type)
    require_fast(tokenizer)
    net.eval().requires_grad_(False)
    if getattr(text, "attn_logit_softcapping", None) and text._attn_implementation == "sdpa":
        net.set_attn_implementation("eager")  # Gemma 2: sdpa leaves the cap out, and older transformers choose it
    model = Model(net=net, tokenizer=tokenizer, family=family, **about)
    if getattr(text, "do_layer_norm_before", True) is False:
        raise BadInput(
            f"{model.name} norms its residual stream after every layer, where MEMIT's equations do not hold",
            hint="OPT models other than opt-350m norm before each layer and work",
        )
    fit_names(model)
    rows = net.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise BadInput(
            f"The tokenizer does not match {model.name}",
            details=[f"expected at most {rows} tokens", f"found {len(tokenizer)}"],
            hint="use the tokenizer files that came with the checkpoint",
        )
    return model
