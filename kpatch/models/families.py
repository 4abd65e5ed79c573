"""One row per model family: where the layers are and what their parts are called."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from kpatch.errors import BadInput


@dataclass(frozen=True, slots=True)
class Family:
    """Module names of one architecture; names below `layers` are relative to one layer.

    `down` is the MLP's output projection, the matrix W^l that is edited; its input is the key.
    `attn_out` and `mlp_out` are the modules whose outputs are added to the residual stream.
    Where `mlp_out` differs from `down`, a norm stands between the two and swallows the scale of what is written.
    """

    model_type: str
    layers: str
    down: str
    attn_out: str
    mlp_out: str
    norm: str
    project_out: str | None = None
    returns_tuple: bool = False

    @property
    def post_norm(self) -> bool:
        """True when the MLP's output is normed before it joins the residual stream."""
        return self.mlp_out != self.down


def _llama_like(model_type: str) -> Family:
    return Family(
        model_type,
        layers="model.layers",
        down="mlp.down_proj",
        attn_out="self_attn.o_proj",
        mlp_out="mlp.down_proj",
        norm="model.norm",
    )


def _post_norm(model_type: str) -> Family:
    return replace(_llama_like(model_type), attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")


def _gpt(model_type: str, down: str, attn_out: str, returns_tuple: bool = False) -> Family:
    return Family(
        model_type,
        layers="transformer.h",
        down=down,
        attn_out=attn_out,
        mlp_out=down,
        norm="transformer.ln_f",
        returns_tuple=returns_tuple,
    )


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        _gpt("gpt2", "mlp.c_proj", "attn.c_proj"),
        _gpt("gptj", "mlp.fc_out", "attn.out_proj", returns_tuple=True),
        Family(
            "gpt_neox",
            layers="gpt_neox.layers",
            down="mlp.dense_4h_to_h",
            attn_out="attention.dense",
            mlp_out="mlp.dense_4h_to_h",
            norm="gpt_neox.final_layer_norm",
        ),
        Family(
            "opt",
            layers="model.decoder.layers",
            down="fc2",
            attn_out="self_attn.out_proj",
            mlp_out="fc2",
            norm="model.decoder.final_layer_norm",
            project_out="model.decoder.project_out",
        ),
        _llama_like("llama"),
        _llama_like("mistral"),
        _llama_like("qwen2"),
        _llama_like("qwen3"),
        Family(
            "phi",
            layers="model.layers",
            down="mlp.fc2",
            attn_out="self_attn.dense",
            mlp_out="mlp.fc2",
            norm="model.final_layernorm",
        ),
        _post_norm("gemma2"),
        _post_norm("gemma3_text"),
        _post_norm("olmo2"),
    )
}

_BY_HAND = ("layers", "down", "attn_out", "mlp_out", "norm", "project_out")


def family_for(model_type: str, modules: dict[str, str] | None = None) -> Family:
    """The row for `model_type`, with any names in `modules` put in place of the table's.

    Raises BadInput for an unknown family without names by hand, and for a name that no row has.
    """
    modules = dict(modules or {})
    unknown = sorted(set(modules) - set(_BY_HAND))
    if unknown:
        raise BadInput(
            f"Unknown module name {unknown[0]!r} in --modules",
            details=[f"expected names among {', '.join(_BY_HAND)}"],
        )
    row = FAMILIES.get(model_type)
    if row is not None:
        return replace(row, **modules) if modules else row  # type: ignore[arg-type]
    missing = [name for name in ("layers", "down", "attn_out", "norm") if name not in modules]
    if missing:
        raise BadInput(
            f"Model family {model_type!r} is not in the table",
            details=[
                f"expected one of {', '.join(sorted(FAMILIES))}",
                f"or the names of its modules by hand; missing: {', '.join(missing)}",
            ],
            hint="give them once: --modules layers=model.layers,down=mlp.down_proj,"
            "attn_out=self_attn.o_proj,norm=model.norm"
            " (and mlp_out=… where a norm follows the MLP)",
        )
    modules.setdefault("mlp_out", modules["down"])
    known = {field.name for field in fields(Family)}
    return Family(model_type=model_type, **{k: v for k, v in modules.items() if k in known})  # type: ignore[arg-type]
