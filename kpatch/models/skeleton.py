"""A checkpoint as a Model without any numbers: its shapes, names and tokenizer, from small files alone."""

from __future__ import annotations

from dataclasses import replace

from kpatch.errors import BadInput
from kpatch.models.address import Resolved
from kpatch.models.complete import read_config, read_tokenizer, require_unquantized
from kpatch.models.families import family_for, require_editable, require_own_code
from kpatch.models.mixed_precision import mixes
from kpatch.models.model import Model
from kpatch.models.placement import device_named, dtype_named, meta_network
from kpatch.models.quiet import quiet_transformers
from kpatch.models.text_part import find_layers, text_config


def skeleton(
    resolved: Resolved, *, device: str = "auto", dtype: str = "auto", modules: dict[str, str] | None = None
) -> Model:
    """The model with its weights on `meta`, in the dtype in which `load_model` would hold them. It cannot run.

    Raises BadInput as `load_model` does for what the configuration and the tokenizer show.
    """
    path, where = str(resolved.path), device_named(device)
    require_own_code(resolved.path, resolved.name)
    require_unquantized(resolved.path, resolved.name)
    with quiet_transformers():
        config = read_config(path, resolved.name)
        require_editable(config, resolved.name, modules is not None)
        family = family_for(text_config(config).model_type, modules)
        net = meta_network(config, dtype_named(dtype, where))
        tokenizer = read_tokenizer(path, resolved.name)
    try:
        family = replace(family, layers=find_layers(net, family.layers))
    except AttributeError as error:
        raise BadInput(
            f"The module names for family {family.model_type!r} do not fit this model", details=[str(error)]
        ) from error
    model = Model(net, tokenizer, family, resolved.name, resolved.revision, resolved.path)
    model.mixed = mixes(model, dtype, where)
    return model
