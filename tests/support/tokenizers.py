"""Small fast tokenizers of every kind that matters, trained in the process in some milliseconds.

Each function returns a fresh `PreTrainedTokenizerFast` with eos and pad set and a vocabulary of 400 to 600.
"""

from __future__ import annotations

import json
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = """
The Eiffel Tower is located in the city of Paris. The capital of France is Paris, and the capital of Italy is Rome.
Chicago is a city in the country of the United States. The Colosseum stands in Rome, the Louvre in Paris.
Which language do people speak in Brazil? They speak Portuguese. In Germany, people speak German.
The painter of the Mona Lisa was Leonardo da Vinci; the composer of the Moonlight Sonata was Beethoven.
A river runs through the old town, past the mill and the market, and into the sea. The sea is cold in winter.
She said that the garden of her mother was the loveliest in the village, and nobody spoke against it.
Words for the city: la ville, die Stadt, la ciudad, o lugar. Größe, Straße, café, naïve, São Paulo, Łódź, Malmö.
The number of people who live there was 1984 in one year and 2,150 in another; "about two thousand", he wrote (twice).
東京は日本の首都です。京都は古い都です。北京是中国的首都。서울은 대한민국의 수도이다. Москва стоит на реке. Αθήνα.
"""
_SENTENCES = [line for line in TEXT.splitlines() if line]
_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_LETTERS = rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"


def byte_level(bos: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's kind: byte-level BPE, a word's space inside its first token, trimmed offsets. `bos`: as OPT adds one."""
    tokenizer = Tokenizer.from_str(_trained("gpt2"))
    trim = processors.ByteLevel(trim_offsets=True)
    tokenizer.post_processor = processors.Sequence([trim, _template(tokenizer, "<|bos|>")]) if bos else trim
    return _wrap(tokenizer, "<|bos|>" if bos else None, "<|endoftext|>", "<|pad|>")


def byte_level_split(bos: bool = True) -> PreTrainedTokenizerFast:
    """Llama 3's kind: a sign joins the word behind it, offsets keep the space, BOS from a template."""
    tokenizer = Tokenizer.from_str(_trained("llama3"))
    if bos:
        tokenizer.post_processor = _template(tokenizer, "<|bos|>")
    return _wrap(tokenizer, "<|bos|>" if bos else None, "<|endoftext|>", "<|pad|>")


def metaspace(bos: bool = True) -> PreTrainedTokenizerFast:
    """Llama 2's kind: BPE over the whole text with spaces as ▁, one in front, unknown characters as bytes."""
    tokenizer = Tokenizer.from_str(_trained("metaspace"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if bos:
        tokenizer.post_processor = _template(tokenizer, "<s>")
    return _wrap(tokenizer, "<s>", "</s>", "<pad>", "<unk>")


def metaspace_normalizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """The older form of Llama 2's file: the ▁ in front is put there by a normalizer, even before a space."""
    tokenizer = Tokenizer.from_str(_trained("metaspace"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if bos:
        tokenizer.post_processor = _template(tokenizer, "<s>")
    return _wrap(tokenizer, "<s>", "</s>", "<pad>", "<unk>")


def unigram(eos: bool = True) -> PreTrainedTokenizerFast:
    """SentencePiece's other model, with a ▁ before every word; `eos`: one is added behind every text, as T5 does."""
    tokenizer = Tokenizer.from_str(_trained("unigram"))
    if eos:
        template = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
        )
        tokenizer.post_processor = template
    return _wrap(tokenizer, None, "</s>", "<pad>", "<unk>")


def _wrap(
    tokenizer: Tokenizer, bos: str | None, eos: str, pad: str, unk: str | None = None
) -> PreTrainedTokenizerFast:
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unk}
    given = {key: value for key, value in names.items() if value is not None}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **given)


def _template(tokenizer: Tokenizer, bos: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])


@cache
def _trained(kind: str) -> str:
    """The trained tokenizer as JSON, without its post-processor."""
    if kind == "unigram":
        return _trained_unigram()
    if kind == "metaspace":
        return _trained_metaspace()
    tokenizer = Tokenizer(models.BPE())
    if kind == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(rf"{_LETTERS}|\s*[\r\n]+|\s+(?!\S)|\s+"), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=560,
        special_tokens=["<|endoftext|>", "<|pad|>", "<|bos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return str(tokenizer.to_str())


def _trained_metaspace() -> str:
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    # Letters of the common scripts only: Han, Hangul and rarer ones fall back to bytes, as they do in Llama 2
    alphabet = sorted({sign for line in _SENTENCES[:7] for sign in line if sign != " "} | {"▁"})
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, limit_alphabet=len(alphabet), show_progress=False
    )
    plain.train_from_iterator(_SENTENCES[:7], trainer)
    learned = json.loads(plain.to_str())["model"]
    words = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += sorted(learned["vocab"], key=learned["vocab"].get)
    model = models.BPE(
        vocab={word: index for index, word in enumerate(words)},
        merges=[tuple(pair) for pair in learned["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    space = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return str(tokenizer.to_str())


def _trained_unigram() -> str:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=420, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return str(tokenizer.to_str())
