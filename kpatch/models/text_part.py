"""The text part of a model: in a model with vision (a wrapper) it has its own configuration and lies deeper.

Only that part is run, edited and measured. Everything else of a wrapper stays as it was loaded.
"""

from __future__ import annotations

from typing import Any


def text_config(config: Any) -> Any:
    """The configuration of the text part: `config` itself where there is no other part."""
    return config.get_text_config()


def loader(config: Any) -> Any:
    """The transformers class that loads all weights of a checkpoint with this configuration, vision included."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    whole = text_config(config) is not config and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if whole else AutoModelForCausalLM


def find_layers(net: Any, name: str) -> str:
    """The name that `name`, the layers of a text model, has in `net`: its own, or one with a wrapper's prefix.

    Raises AttributeError, naming all that were tried, where the network has none of them.
    """
    base, _, rest = name.partition(".")
    tried = [name, f"{base}.language_model.{rest}", f"language_model.{name}", f"{base}.text_model.{rest}"]
    for candidate in tried:
        try:
            net.get_submodule(candidate)
        except AttributeError:
            continue
        return candidate
    raise AttributeError(f"the network has no {' or '.join(tried)}")
