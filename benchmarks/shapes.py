"""Networks of GPT-J's shape with random weights, and a tokenizer without training: what benchmarks of size run on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Shape:
    """GPT-J's own sizes: 6.05 billion parameters, 12.1 GB in bfloat16."""

    layers: int = 28
    width: int = 4096
    heads: int = 16
    vocabulary: int = 50400

    def config(self) -> GPTJConfig:
        return GPTJConfig(
            n_layer=self.layers,
            n_embd=self.width,
            n_head=self.heads,
            rotary_dim=min(64, self.width // self.heads),
            vocab_size=self.vocabulary,
            n_positions=2048,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
            dtype="bfloat16",
        )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and one that ends a text: a tokenizer that needs no data. Texts are longer than GPT-J's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{letter: number + 1 for number, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", bos_token="<|endoftext|>"
    )


def meta(shape: Shape) -> GPTJForCausalLM:
    """The network without numbers."""
    with torch.device("meta"):
        return GPTJForCausalLM(shape.config()).to(torch.bfloat16)


def numbers(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Random weights for one tensor, as a network of this kind has them: norms near 1, matrices of 1 / √fan-in."""
    if name.endswith("bias"):
        return torch.zeros(like.shape, dtype=torch.bfloat16)
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=torch.bfloat16)
    size = 0.5 if "wte" in name else like.shape[1] ** -0.5
    block = torch.empty(like.shape, dtype=torch.float32).normal_(0.0, size, generator=generator)
    return block.to(torch.bfloat16)


def write_checkpoint(folder: Path, shape: Shape, seed: int = 0) -> int:
    """A checkpoint directory, one shard a layer, never more than one shard in memory; its parameters are counted."""
    folder.mkdir(parents=True, exist_ok=True)
    net, generator = meta(shape), torch.Generator().manual_seed(seed)
    where: dict[str, str] = {}
    count = 0
    for number, group in enumerate(groups(net)):
        file = f"model-{number + 1:05}.safetensors"
        tensors = {name: numbers(name, like, generator) for name, like in group.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        count += sum(tensor.numel() for tensor in tensors.values())
    index = {"metadata": {"total_size": 2 * count}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    shape.config().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return count


def groups(net: Any) -> Iterator[dict[str, Tensor]]:
    """The tensors that a checkpoint holds: those of each layer, then the others."""
    state = net.state_dict()
    layers = [f"transformer.h.{number}." for number in range(net.config.n_layer)]
    for prefix in layers:
        yield {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    yield {name: tensor for name, tensor in state.items() if not name.startswith(tuple(layers))}
