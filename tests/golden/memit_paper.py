"""MEMIT from the published equations alone, to keep z and Δ of a tiny GPT-2 as golden numbers.

Nothing of kpatch and nothing of the test oracle is used here: transformers' GPT2LMHeadModel in float64, forward
hooks, one row of tokens at a time, torch.optim.Adam, and one dense solve a layer. The numbers that are kept in
`memit_paper.safetensors` were written by

    python -m tests.golden.memit_paper

and the settings they depend on stand in the file's metadata.

Equations are those of Meng et al. 2023, "Mass-Editing Memory in a Transformer" (MEMIT), and where it says so of
Meng et al. 2022, "Locating and Editing Factual Associations in GPT" (ROME). What the papers leave open follows the
authors' published choices:
- the target's tokens are scored by their mean log-probability, and every row weighs the same;
- δ is projected onto the ball ‖δ‖ ≤ clamp · ‖h^L‖ after each step, and the last iteration takes no step;
- the decay is ‖δ‖ / ‖h^L‖²;
- a key is the mean of two means, of the bare prompt and of the prompts in a context.
At one place the equation and the authors' code differ: the code reads the drift (KL) behind the subject, the equation
behind the whole prompt "{subject} is a". Here it is read where the equation reads it.

Dimension letters: n facts, d width, f MLP width, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from tests.support.tokenizers import TEXT, byte_level

GOLDEN = Path(__file__).with_suffix(".safetensors")

# No subject is the first token of a text, where kpatch edits in another layer than the paper does
FACTS = (
    ("The city of {}", "Brazil", "Rome"),
    ("She stood by the {}", "Mona Lisa", "Beethoven"),
    ("{} is", "Eiffel Tower", "Malmö"),
)
CONTEXTS = ("As everyone knows,", "In the news today:")
CORPUS = TEXT.strip()
SETTINGS: dict[str, Any] = {
    "seed": 5,  # of the model's weights
    "layers": [1, 2],  # R; L is the last of them
    "steps": 16,
    "learning_rate": 0.3,
    "stop_loss": 4.5,
    "clamp": 1.0,
    "weight_decay": 0.5,
    "kl": 1.0,  # large enough to be felt
    "covariance_weight": 200.0,  # λ
    "covariance_tokens": 256,
    "row": 128,  # tokens of the corpus that see each other
}


class Row(NamedTuple):
    """Token ids, the position of the subject's last token, and how many ids are the prompt's."""

    ids: list[int]
    subject_last: int
    prompt_length: int


# The model


def tiny_gpt2() -> tuple[GPT2LMHeadModel, Any]:
    """A random GPT-2 of four layers, float32, d = 16 and f = 32, and its tokenizer.

    Weights are drawn in the order of their names, large enough that every layer moves the residual stream by about
    its own size; layer norms and biases are uneven.
    """
    tokenizer = byte_level()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=16, n_layer=4, n_head=4, n_inner=32, attn_pdrop=0.0,
        embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    net = GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(SETTINGS["seed"])
    with torch.no_grad():
        for name, weight in sorted(net.named_parameters()):
            drawn = torch.randn(weight.shape, generator=generator)
            if "ln_" in name and name.endswith("weight"):
                weight.copy_(1 + 0.2 * drawn)
            elif weight.ndim == 1:
                weight.copy_(0.2 * drawn)
            elif name.startswith("transformer.w"):  # the embeddings
                weight.copy_(0.4 * drawn)
            else:  # a Conv1D is stored [in, out]
                weight.copy_(drawn * weight.shape[0] ** -0.5)
    return net.eval(), tokenizer


def encode(tokenizer: Any, prompt: str, subject: str, target: str = "", context: str = "") -> Row:
    """x_j ⊕ p(s, r) and o as GPT-2 reads them; a word's space belongs to the word behind it."""
    before = (f"{context} " if context else "") + prompt[: prompt.index("{}")]
    full = before + subject + prompt[prompt.index("{}") + 2 :]
    asked = tokenizer(full).input_ids
    answer = tokenizer(f" {target}").input_ids if target else []
    return Row(asked + answer, len(tokenizer(before + subject).input_ids) - 1, len(asked))


def logits(net: nn.Module, ids: list[int]) -> Tensor:
    """[T, V] of one row."""
    found: Tensor = net(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return found


@contextmanager
def hooked(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, `change` maps what leaves `module`: [1, T, ·] → [1, T, ·]."""

    def hook(_: nn.Module, args: Any, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def hidden_state(net: GPT2LMHeadModel, row: Row, layer: int) -> Tensor:
    """h^layer [d] at the subject's last token."""
    seen: list[Tensor] = []

    def keep(out: Tensor) -> Tensor:
        seen.append(out[0, row.subject_last].clone())
        return out

    with hooked(net.transformer.h[layer], keep):
        logits(net, row.ids)
    return seen[0]


@torch.no_grad()
def keys_of(net: GPT2LMHeadModel, ids: list[int], layer: int) -> Tensor:
    """k^layer = σ(W_in γ(h)) [T, f] at every token: what the activation puts out, which W_out multiplies."""
    seen: list[Tensor] = []

    def keep(out: Tensor) -> Tensor:
        seen.append(out[0].clone())
        return out

    with hooked(net.transformer.h[layer].mlp.act, keep):
        logits(net, ids)
    return seen[0]


# z_i


def find_value(net: GPT2LMHeadModel, tokenizer: Any, fact: tuple[str, str, str]) -> tuple[Tensor, int]:
    """z_i [d] = h_i^L + argmin over δ of eq. 16, with the number of iterations it took."""
    prompt, subject, target = fact
    last = max(SETTINGS["layers"])
    rows = [encode(tokenizer, prompt, subject, target, context) for context in ("", *CONTEXTS)]
    drift = encode(tokenizer, "{} is a", subject)
    h = hidden_state(net, rows[0], last)  # of the bare prompt
    with torch.no_grad():
        unedited = logits(net, drift.ids)[-1].log_softmax(-1)  # (V,)
    delta = torch.zeros_like(h).requires_grad_()
    adam = torch.optim.Adam([delta], lr=SETTINGS["learning_rate"])

    def edited(row: Row) -> Tensor:
        """log P under G(h_i^L += δ), [T, V]."""

        def add(out: Tensor) -> Tensor:
            moved = out.clone()
            moved[0, row.subject_last] += delta
            return moved

        with hooked(net.transformer.h[last], add):
            return logits(net, row.ids).log_softmax(-1)

    for iteration in range(1, SETTINGS["steps"] + 1):
        adam.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for row in rows:  # eq. 16: 1/P Σ_j −log P[o_i | x_j ⊕ p(s_i, r_i)]
            log_p = edited(row)
            tokens = range(row.prompt_length, len(row.ids))
            loss = loss - sum(log_p[t - 1, row.ids[t]] for t in tokens) / len(tokens) / len(rows)
        now = edited(drift)[-1]  # ROME, eq. 4: D_KL(P_edited[x | p'] ‖ P[x | p'])
        loss = loss + SETTINGS["kl"] * (now.exp() * (now - unedited)).sum()
        loss = loss + SETTINGS["weight_decay"] * delta.norm() / h.norm() ** 2
        if loss.item() < SETTINGS["stop_loss"] or iteration == SETTINGS["steps"]:
            break
        loss.backward()
        adam.step()
        with torch.no_grad():
            delta *= min(1.0, float(SETTINGS["clamp"] * h.norm() / delta.norm()))
    return h + delta.detach(), iteration


# C, K, R and Δ


def second_moment(net: GPT2LMHeadModel, tokenizer: Any, layer: int) -> Tensor:
    """E[k k^T] of eq. 15, [f, f]: the mean over the corpus's first tokens, in rows from its start on."""
    ids = tokenizer(CORPUS).input_ids[: SETTINGS["covariance_tokens"]]
    k = torch.cat([keys_of(net, ids[at : at + SETTINGS["row"]], layer) for at in range(0, len(ids), SETTINGS["row"])])
    return k.T @ k / len(k)


def key(net: GPT2LMHeadModel, tokenizer: Any, fact: tuple[str, str, str], layer: int) -> Tensor:
    """k_i^l [f] of section 4.3: the mean over contexts of the key at the subject's last token."""
    prompt, subject, target = fact

    def one(context: str) -> Tensor:
        row = encode(tokenizer, prompt, subject, target, context)
        return keys_of(net, row.ids, layer)[row.subject_last]

    return (one("") + sum(one(context) for context in CONTEXTS) / len(CONTEXTS)) / 2


def memit() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Algorithm 1: z [n, d] and Δ^l [d, f] of every layer, float32, and the settings and iterations."""
    net, tokenizer = tiny_gpt2()
    net = net.double()
    layers = SETTINGS["layers"]
    last = max(layers)
    # C_0 of the unedited model
    moments = {layer: second_moment(net, tokenizer, layer) for layer in layers}
    # first loop: a value for every fact
    found = [find_value(net, tokenizer, fact) for fact in FACTS]
    values = torch.stack([z for z, _ in found])  # (n, d)
    bare = [encode(tokenizer, prompt, subject, target) for prompt, subject, target in FACTS]
    tensors = {"z": values.float()}
    # second loop: layers rising, each under the weights that the layers below it left
    for layer in layers:
        k = torch.stack([key(net, tokenizer, fact, layer) for fact in FACTS], dim=1)  # (f, n)
        h = torch.stack([hidden_state(net, row, last) for row in bare])  # (n, d)
        r = ((values - h) / (last - layer + 1)).T  # (d, n): r_i^l = (z_i − h_i^L) / (L − l + 1)
        c = SETTINGS["covariance_weight"] * moments[layer]  # eq. 15
        delta = r @ k.T @ torch.linalg.inv(c + k @ k.T)  # eq. 14
        with torch.no_grad():
            net.transformer.h[layer].mlp.c_proj.weight += delta.T  # W ← W + Δ, stored [f, d]
        tensors[f"delta.{layer}"] = delta.float().contiguous()
    settings = {
        **SETTINGS, "facts": FACTS, "contexts": CONTEXTS, "iterations": [count for _, count in found],
        "ids": [row.ids for row in bare],
    }  # fmt: skip
    return tensors, settings


if __name__ == "__main__":
    computed, about = memit()
    save_file(computed, GOLDEN, metadata={"settings": json.dumps(about, ensure_ascii=False)})
    print(GOLDEN, {name: [float(t.norm()), *t.shape] for name, t in computed.items()}, about["iterations"])
