"""One row per model family: where the layers are and what their parts are called."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from kpatch.errors import BadInput
from kpatch.models.text_part import text_config


@dataclass(frozen=True, slots=True)
class Family:
    """Module names of one architecture; names below `layers` are relative to one layer.

    `down` is the MLP's output projection, the matrix W^l that is edited; its input is the key.
    `attn_out` and `mlp_out` are the modules whose outputs are added to the residual stream.
    Where layers are of several kinds, a name is a choice, `self_attn.o_proj|conv.out_proj`: a layer has one of them.
    Of `down` the first choice is a dense MLP's, the others are shared experts'; a layer may have none of them.
    A norm as `mlp_out` stands behind `down` and swallows the scale of what is written.
    `transposed` is true where W is stored [in, out]. `gguf` is llama.cpp's name of the architecture, if it has it.
    """

    model_type: str
    layers: str
    down: str
    attn_out: str
    mlp_out: str
    transposed: bool = False
    gguf: str | None = None

    @property
    def post_norm(self) -> bool:
        """True when the MLP's output is normed before it joins the residual stream."""
        return not any(down == out or down.startswith(out + ".") for down in choices(self.down)
                       for out in choices(self.mlp_out))  # fmt: skip

    @property
    def attention_only(self) -> bool:
        """True when every layer mixes tokens by attention, so that keys and values are all it must remember."""
        return len(choices(self.attn_out)) == 1


def choices(name: str) -> list[str]:
    """The module names that one name of a row stands for."""
    return name.split("|")


def _llama_like(model_type: str, gguf: str | None = None, **names: str) -> Family:
    row = Family(model_type, "model.layers", "mlp.down_proj", "self_attn.o_proj", "mlp.down_proj", gguf=gguf)
    if "down" in names:
        names.setdefault("mlp_out", names["down"])
    return replace(row, **names)  # type: ignore[arg-type]


def _post_norm(model_type: str, gguf: str | None = None) -> Family:
    return _llama_like(model_type, gguf, attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")


def _experts(model_type: str, gguf: str | None = None, shared: str = "mlp.shared_experts", **names: str) -> Family:
    """A family whose layers have a dense MLP or a mixture of experts; m^l is what either puts out."""
    mlp = shared.partition(".")[0]
    down = names.pop("down", f"{mlp}.down_proj|{shared}.down_proj")
    return _llama_like(model_type, gguf, down=down, mlp_out=mlp, **names)


def _gpt(model_type: str, down: str, attn_out: str, gguf: str | None = None, layers: str = "transformer.h") -> Family:
    return Family(model_type, layers, down, attn_out, mlp_out=down, gguf=gguf)


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        replace(_gpt("gpt2", "mlp.c_proj", "attn.c_proj", "GPT2"), transposed=True),
        _gpt("gptj", "mlp.fc_out", "attn.out_proj"),
        _gpt("gpt_neo", "mlp.c_proj", "attn.attention.out_proj"),
        _gpt("gpt_bigcode", "mlp.c_proj", "attn.c_proj", "STARCODER"),
        _gpt("codegen", "mlp.fc_out", "attn.out_proj"),
        _gpt("bloom", "mlp.dense_4h_to_h", "self_attention.dense", "BLOOM"),
        _gpt("falcon", "mlp.dense_4h_to_h", "self_attention.dense", "FALCON"),
        _gpt("mpt", "ffn.down_proj", "attn.out_proj", "MPT", layers="transformer.blocks"),
        _gpt("gpt_neox", "mlp.dense_4h_to_h", "attention.dense", "GPTNEOX", layers="gpt_neox.layers"),
        _gpt("opt", "fc2", "self_attn.out_proj", layers="model.decoder.layers"),
        _llama_like("llama", "LLAMA"),
        _llama_like("mistral", "LLAMA"),
        _llama_like("ministral", "LLAMA"),
        _llama_like("ministral3", "MISTRAL3"),
        _llama_like("qwen2", "QWEN2"),
        _llama_like("qwen3", "QWEN3"),
        _llama_like("phi", "PHI2", down="mlp.fc2", attn_out="self_attn.dense"),
        _llama_like("phi3", "PHI3"),
        _llama_like("gemma", "GEMMA"),
        _llama_like("olmo", "OLMO"),
        _llama_like("smollm3", "SMOLLM3"),
        _llama_like("stablelm", "STABLELM"),
        _llama_like("starcoder2", "STARCODER2", down="mlp.c_proj"),
        _llama_like("cohere", "COMMAND_R"),
        _llama_like("cohere2", "COHERE2"),
        _llama_like("granite", "GRANITE"),
        _llama_like("glm", "CHATGLM"),
        _llama_like("nemotron", "NEMOTRON"),
        _llama_like("seed_oss", "SEED_OSS"),
        _llama_like("helium"),
        _llama_like("ernie4_5", "ERNIE4_5"),
        _llama_like("apertus", "APERTUS"),
        _llama_like("arcee", "ARCEE"),
        _llama_like("minicpm3", "MINICPM3"),
        _post_norm("gemma2", "GEMMA2"),
        _post_norm("gemma3_text", "GEMMA3"),
        _post_norm("gemma4_text", "GEMMA4"),
        _post_norm("olmo2", "OLMO2"),
        _post_norm("olmo3", "OLMO2"),
        _post_norm("exaone4", "EXAONE4"),
        _llama_like("glm4", "GLM4", attn_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm"),
        # Layers of several kinds
        _llama_like("lfm2", "LFM2", down="feed_forward.w2", attn_out="self_attn.out_proj|conv.out_proj"),
        _llama_like("qwen3_5_text", "QWEN35", attn_out="self_attn.o_proj|linear_attn.out_proj"),
        # Text parts that come in models with vision only
        _llama_like("qwen2_vl_text", "QWEN2VL"),
        _llama_like("qwen2_5_vl_text", "QWEN2VL"),
        _llama_like("qwen3_vl_text", "QWEN3VL"),
        # Dense layers and mixtures of experts, most of them with a shared expert
        _experts("deepseek_v2", "DEEPSEEK2"),
        _experts("deepseek_v3", "DEEPSEEK2"),
        _experts("glm4_moe", "GLM4_MOE"),
        _experts("dots1", "DOTS1"),
        _experts("ernie4_5_moe", "ERNIE4_5_MOE"),
        _experts("hunyuan_v1_moe", "HUNYUAN_MOE", "mlp.shared_mlp"),
        _experts("llama4_text", "LLAMA4", "feed_forward.shared_expert"),
        _experts("qwen2_moe", "QWEN2MOE", "mlp.shared_expert"),
        _experts("qwen3_moe", down="mlp.down_proj"),
        _experts("qwen3_next", "QWEN3NEXT", "mlp.shared_expert", attn_out="self_attn.o_proj|linear_attn.out_proj"),
        _experts(
            "qwen3_5_moe_text", "QWEN35MOE", "mlp.shared_expert", attn_out="self_attn.o_proj|linear_attn.out_proj"
        ),
        _experts(
            "lfm2_moe", "LFM2MOE", "feed_forward", down="feed_forward.w2", attn_out="self_attn.out_proj|conv.out_proj"
        ),
    )
}

# Why a model that is none of these cannot be edited, by what its configuration says
_NO_MLP = ("mamba", "mamba2", "falcon_mamba", "xlstm")
_RECURRENT = ("rwkv",)
_ONE_PART_EACH = ("nemotron_h",)
_SIDE_BY_SIDE = ("falcon_h1", "zamba", "zamba2")
_ENCODERS = (
    *("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "albert", "deberta", "deberta-v2"),
    *("modernbert", "mpnet", "roformer", "big_bird"),
)
_BOTH_WAYS = ("paligemma",)
_SEVERAL_STREAMS = ("gemma3n_text",)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ONLY_EXPERTS = ("mixtral", "olmoe", "granitemoe", "phimoe", "gpt_oss", "minimax", "minimax_m2", "jetmoe", "dbrx")
_SHARED = (
    *("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts"),
    *("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size"),
)
# Mixtures of experts without a row that can be edited under these names
_BY_NAME = {
    "jamba": "layers=model.layers,down=feed_forward.down_proj,attn_out=self_attn.o_proj|mamba.out_proj,"
    "mlp_out=feed_forward",
    "granitemoeshared": "layers=model.layers,down=shared_mlp.output_linear,attn_out=self_attn.o_proj",
}
NO_PLACE = (
    "can be edited in no layer: its MLP is a mixture of experts, which is no one matrix that holds a fact's key and"
    " value, and none of its layers has a dense MLP or a shared expert"
)


def has_experts(text: Any) -> bool:
    """Whether the configuration of a text part speaks of mixtures of experts."""
    return any((getattr(text, key, 0) or 0) > 1 for key in _EXPERTS)


def require_editable(config: Any, name: str, by_hand: bool = False) -> None:
    """Refuse, in one sentence each, the kinds of models that cannot be edited.

    With module names given by hand, a mixture of experts may have a shared expert that they point to.
    `config` is a transformers configuration. Raises BadInput.
    """
    text, hint = text_config(config), None
    why = None
    if getattr(config, "is_encoder_decoder", False):
        why = "is an encoder-decoder: a fact's subject is read by one network and its target written by another"
    elif config.model_type in _ENCODERS:
        why = "is an encoder: it fills gaps and does not continue a prompt"
    elif config.model_type in _NO_MLP:
        why = "is built of state-space layers, which have no MLP whose output projection could be edited"
    elif config.model_type in _RECURRENT:
        why = (
            "is a recurrent network: its layers hand on more from token to token than attention can be asked for again"
        )
    elif text.model_type in _ONE_PART_EACH:
        why = "has layers that are attention, a state-space block or an MLP each, and never attention with an MLP"
    elif text.model_type in _SIDE_BY_SIDE:
        why = "runs attention and a state-space block side by side in its layers, whose states are not kept apart"
    elif config.model_type in _BOTH_WAYS or getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        why = "reads its prompt in both directions, so that a subject's state depends on the words behind it"
    elif _without_attention(text):
        why = "has no layer of full attention, and transformers cannot continue a text without one"
    elif text.model_type in _SEVERAL_STREAMS:
        why = "carries several residual streams side by side, and the equations of the methods hold for one"
    elif text.model_type in _ONLY_EXPERTS:
        why = NO_PLACE
    elif not by_hand and text.model_type not in FAMILIES and has_experts(text):
        why = "is not in the table of families, and its MLP is a mixture of experts"
        hint = _names_by_hand(text)
    if why is not None:
        raise BadInput(
            f"{name} ({text.model_type}) {why}",
            details=["kpatch edits decoders with dense MLPs or shared experts"],
            hint=hint,
        )


def _names_by_hand(text: Any) -> str | None:
    """A hint at names that serve for a mixture of experts without a row, where its configuration shows any."""
    names = _BY_NAME.get(text.model_type)
    if names is not None:
        return f"its dense layers and shared experts have names, which `modules` takes: {names}"
    if any(getattr(text, key, 0) for key in _SHARED):
        return (
            "where it has a shared expert, give its names with `modules`: layers=model.layers,"
            "down=mlp.shared_experts.down_proj,attn_out=self_attn.o_proj,mlp_out=mlp"
        )
    return None


def _without_attention(text: Any) -> bool:
    kinds = getattr(text, "layer_types", None) or ()
    return bool(kinds) and all(kind in ("conv", "linear_attention") for kind in kinds)


def require_own_code(path: Path, name: str) -> None:
    """Refuse a checkpoint whose architecture only code of its own knows: kpatch runs no code that comes with a model.

    Raises BadInput. A config.json that cannot be read is left to transformers.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        kind, own = str(config.get("model_type")), config.get("auto_map")
    except (OSError, ValueError, AttributeError):
        return
    from transformers import CONFIG_MAPPING

    if own and kind not in CONFIG_MAPPING:
        raise BadInput(
            f"{name} ({kind}) needs code of its own to run, and kpatch runs no code that comes with a model",
            where=str(path),
        )


_BY_HAND = ("layers", "down", "attn_out", "mlp_out", "transposed")
_UNUSED = ("norm", "project_out")  # earlier versions needed them; the network's own code is run now


def family_for(model_type: str, modules: dict[str, str] | None = None) -> Family:
    """The row for `model_type`, with any names in `modules` put in place of the table's.

    Raises BadInput for an unknown family without names by hand, and for a name that no row has.
    """
    given = {name: value for name, value in (modules or {}).items() if name not in _UNUSED}
    unknown = sorted(set(given) - set(_BY_HAND))
    if unknown:
        raise BadInput(
            f"Unknown module name {unknown[0]!r} in `modules`",
            details=[f"expected names among {', '.join(_BY_HAND)}"],
        )
    names: dict[str, str | bool] = {**given}
    if "transposed" in given:
        if given["transposed"] not in ("true", "false"):
            raise BadInput(f"`modules` has transposed={given['transposed']}", details=["expected true or false"])
        names["transposed"] = given["transposed"] == "true"
    row = FAMILIES.get(model_type)
    if row is not None:
        return replace(row, **names) if names else row  # type: ignore[arg-type]
    missing = [name for name in ("layers", "down", "attn_out") if name not in names]
    if missing:
        raise BadInput(
            f"Model family {model_type!r} is not in the table",
            details=[
                f"expected one of {', '.join(sorted(FAMILIES))}",
                f"or the names of its modules by hand; missing: {', '.join(missing)}",
            ],
            hint="give them once with `modules`: layers=model.layers,down=mlp.down_proj,attn_out=self_attn.o_proj"
            " (and mlp_out=… where a norm follows the MLP)",
        )
    names.setdefault("mlp_out", names["down"])
    known = {field.name for field in fields(Family)}
    return Family(model_type=model_type, **{k: v for k, v in names.items() if k in known})  # type: ignore[arg-type]
