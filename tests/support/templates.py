"""Chat templates of every kind that matters, written for these tests, for the tiny tokenizers."""

from __future__ import annotations

from pathlib import Path

from kpatch.models.model import Model
from tests.support import tokenizers
from tests.support.models import tiny

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# White space around a turn is left out, a token opens the text, and an answer stands behind a space (Llama 2's kind)
INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ (bos_token or '') + '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# It ends in a space of its own
SPACED = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# A thought that can be left out, and one that cannot
THINKING = CHATML.replace(
    "assistant\n' }}{% endif %}",
    "assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
    "{% else %}{{ '<think>\n' }}{% endif %}{% endif %}",
)
ALWAYS_THINKING = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
DROPS = "{{ 'user: \n' }}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
SHOUTS = CHATML.replace("m.content", "m.content | upper")
ESCAPES = CHATML.replace("m.content", "m.content | escape | string")
FAILS = "{{ raise_exception('only tools may speak') }}"


def chatty(template: str | None = CHATML) -> Model:
    """A tiny Llama that has a chat template, and the tokens that ChatML puts around a turn."""
    tokenizer = tokenizers.byte_level(bos=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tiny("llama", tokenizer=tokenizer)


def save_chatty(folder: Path, template: str | None = CHATML) -> Path:
    """`chatty` as a checkpoint directory."""
    made = chatty(template)
    made.net.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder
