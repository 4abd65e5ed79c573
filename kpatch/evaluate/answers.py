"""What a model answers: greedy completions in batches, and the likeliest next tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kpatch import arguments
from kpatch.errors import BadInput
from kpatch.evaluate.complete import complete
from kpatch.evaluate.forward import window
from kpatch.evaluate.score import BATCH_TOKENS, Ids
from kpatch.facts.chat import Turn, chat_rows, turn_ends
from kpatch.facts.join import is_unspaced
from kpatch.models.model import Model, require_loaded
from kpatch.reporter import SILENT, Reporter

ANSWER_TOKENS = 6
COMPLETION_TOKENS, CHAT_TOKENS = 12, 64  # how long answers of `ask` may be: behind a prompt, and in a chat
_CONTEXT = 8  # tokens of the prompt decoded with a completion, so that it keeps its leading space


@dataclass(frozen=True, slots=True)
class Token:
    """One candidate for the next token: its text and its probability, 0 to 1."""

    token: str
    probability: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt, its greedy completion with the leading space, and the likeliest first tokens."""

    prompt: str
    completion: str
    top: tuple[Token, ...]


def ask(
    model: Model,
    prompts: str | Sequence[str],
    top: int = 5,
    max_tokens: int | None = None,
    chat: bool = False,
    report: Reporter = SILENT,
) -> list[Answer]:
    """Complete prompts greedily, with at most `max_tokens` tokens (12, in a chat 64); the model's own EOS ends them.

    One prompt counts as a list of one. Prompts are plain texts; spaces at their end are left out, because they belong
    to the answer's first word. With `chat` each is a user's turn in the model's chat template, and the end of the
    model's turn ends an answer. Nothing is sampled. Raises BadInput for an empty prompt, one that is too long for the
    model, and as `chat_rows` does.
    """
    require_loaded(model)
    arguments.whole_number(top, "top", least=0)
    arguments.whole_number(max_tokens, "max_tokens", least=0)
    given: Any = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(given, Sequence) or not all(isinstance(prompt, str) for prompt in given):
        raise BadInput("`prompts` is no text and no list of texts")
    prompts = list(given)
    rows: Sequence[Sequence[int]]
    if chat:
        rows = [row.ids for row in chat_rows(model.tokenizer, [Turn(prompt) for prompt in prompts])]
        ends, most = turn_ends(model.tokenizer), CHAT_TOKENS
    else:
        rows, ends, most = [plain_ids(model.tokenizer, prompt) for prompt in prompts], frozenset(), COMPLETION_TOKENS
    found = complete(
        model, rows, most if max_tokens is None else max_tokens, top, report=report, ends=[ends] * len(rows)
    )
    answers = []
    for prompt, row, one in zip(prompts, rows, found, strict=True):
        tokens = tuple(Token(text_after(model.tokenizer, row, [token]), chance) for token, chance in one.top)
        answers.append(Answer(prompt, text_after(model.tokenizer, row, one.ids), tokens))
    return answers


def answer_rows(
    model: Model,
    rows: Sequence[Ids],
    chat: bool | Sequence[bool],
    ends_text: Callable[[str], bool],
    tokens: int = CHAT_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    doing: str = "Answering",
    report: Reporter = SILENT,
) -> list[str]:
    """What the model writes behind each row, at most `tokens` tokens; a row that comes twice is run once.

    `chat` says of each row, or of all, whether it is a turn in a chat. An answer ends with the model's own EOS, in a
    chat with the end of its turn too, and otherwise where `ends_text` holds of what is written. Near the end of the
    model's positions it has as many tokens as fit. Raises as `complete`.
    """
    turns = [chat] * len(rows) if isinstance(chat, bool) else chat
    asked = [(tuple(row), turn) for row, turn in zip(rows, turns, strict=True)]
    distinct = list(dict.fromkeys(asked))
    longest = window(model)
    room = [tokens if longest is None else max(1, min(tokens, longest - len(row) + 1)) for row, _ in distinct]

    def ended(number: int, written: Ids) -> bool:
        row, turn = distinct[number]
        return not turn and ends_text(text_after(model.tokenizer, row, written))

    ends = turn_ends(model.tokenizer) if any(turns) else frozenset()
    found = complete(
        model,
        [row for row, _ in distinct],
        room,
        batch_tokens=batch_tokens,
        report=report,
        doing=doing,
        ends=[ends if turn else () for _, turn in distinct],
        until=ended,
    )
    texts = {
        one: text_after(model.tokenizer, one[0], written.ids) for one, written in zip(distinct, found, strict=True)
    }
    return [texts[one] for one in asked]


def says(text: str, answer: str) -> bool:
    """Whether a text has an answer in it, in letters of any case; as whole words where spaces part words."""
    return _spot(answer).search(folded(text)) is not None


def without(text: str, answer: str) -> str:
    """A text in small letters, with nothing where it says `answer`."""
    return _spot(answer).sub("", folded(text))


def folded(text: str) -> str:
    """A text as `says` compares it: small letters, one space between words."""
    return " ".join(text.split()).casefold()


def _spot(answer: str) -> re.Pattern[str]:
    wanted = folded(answer)
    before = "" if is_unspaced(wanted[0]) else r"(?<!\w)"
    after = "" if is_unspaced(wanted[-1]) else r"(?!\w)"
    return re.compile(before + re.escape(wanted) + after)


def first_words(text: str) -> str:
    """The first line of an answer that has words, without spaces around it."""
    lines = text.strip().splitlines()
    return lines[0].strip() if lines else ""


def text_after(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` as it continues `before`.

    Some tokenizers drop the first word's space where they decode it alone.
    """
    context = list(before[-_CONTEXT:])
    head = tokenizer.decode(context, clean_up_tokenization_spaces=False)
    whole = tokenizer.decode([*context, *ids], clean_up_tokenization_spaces=False)
    if whole.startswith(head):
        return str(whole[len(head) :])
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that the model goes on with."""
    ids = list(tokenizer(text.rstrip(" "))["input_ids"])
    # Some tokenizers put EOS behind every text; an answer is to follow here
    while ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids.pop()
    return ids
