"""Judge the edits of a checkpoint without kpatch: does it give the new answers, and has it kept the others?

    python benchmarks/quality.py patched/ benchmarks/facts/held_out.yaml --intervals
    python benchmarks/quality.py patched/ counterfact.json --limit 100 --text wikitext.txt --json result.json

kpatch measures its own patches, so a mistake there would hide itself. This program imports nothing of kpatch: it reads
the facts and asks the model with torch, transformers and yaml alone. docs/metrics.md says what the columns mean.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from quality_questions import Question, questions_of, read
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

ROWS = 64  # a batch
LOGITS = 2**27  # numbers in the logits of one batch at most: 512 MiB in float32
WRITTEN = {"paraphrase": 12, "neighbor": 8, "chat edit": 16, "chat neighbor": 16}  # tokens the model writes by itself
TEXT_TOKENS, WINDOW = 20_000, 512
RATES = {
    **{"ES": ("edit", "success"), "PS": ("paraphrase", "success"), "NS": ("neighbor", "success")},
    **{"EA": ("edit", "greedy"), "PA": ("paraphrase", "greedy"), "NA": ("neighbor", "greedy")},
    **{"PL": ("paraphrase", "logprob"), "NL": ("neighbor", "logprob")},
    **{"PF": ("paraphrase", "said"), "NF": ("neighbor", "said")},
    **{"CE": ("chat edit", "said"), "CN": ("chat neighbor", "said")},
}
COLUMNS = ("ES", "PS", "NS", "EA", "PA", "NA", "Score", "PL", "NL", "PF", "NF", "CE", "CN", "perplexity")
LOGARITHMS = ("PL", "NL")

Ids = tuple[int, ...]
Item = tuple[Ids, Ids]  # prompt, answer
Row = tuple[Ids, list[Item]]  # what is run, and what is read off it


@dataclass
class Judge:
    """A network and its tokenizer; every answer is kept, so that what is asked twice runs once."""

    net: Any
    tokenizer: Any
    _scored: dict[Item, tuple[float, bool]] = field(default_factory=dict)

    @staticmethod
    def load(directory: Path, dtype: str = "float32", device: str = "cpu") -> Judge:
        """The checkpoint in `directory`, nothing fetched; what its settings say about sampling is dropped."""
        net = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), local_files_only=True)
        ends = net.generation_config.eos_token_id
        net.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
        return Judge(net.eval().to(device), AutoTokenizer.from_pretrained(directory, local_files_only=True))

    def ids(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text that goes on: with BOS where the tokenizer puts one, without an end."""
        found = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        if special and found and found[-1] == self.tokenizer.eos_token_id and len(found) > 1:
            found = found[:-1]
        return list(found)

    def split(self, prompt: str, answer: str, space: bool) -> Item:
        """Ids of the prompt and of the answer behind it, tokenized as one text."""
        between = " " if space and not prompt[-1:].isspace() else ""
        whole, alone = self.ids(prompt + between + answer), self.ids(prompt)
        cut = next((i for i, (one, other) in enumerate(zip(whole, alone, strict=False)) if one != other), len(alone))
        return tuple(whole[:cut]), tuple(whole[cut:])

    def score(self, questions: Sequence[Question]) -> None:
        """Fill in success, greedy and the two log-probabilities of edits, paraphrases and neighbors."""
        asked = {
            (number, side): self.split(question.prompt, answer, question.space)
            for number, question in enumerate(questions)
            for side, answer in enumerate((question.right, question.rival))
            if answer is not None
        }
        self._run(set(asked.values()) - self._scored.keys())
        for (number, side), key in asked.items():
            question, (logprob, greedy) = questions[number], self._scored[key]
            if side == 0:
                question.logprob, question.greedy = logprob, greedy
            elif question.rival != question.right:
                question.rival_logprob = logprob
                question.success = bool(question.logprob > logprob)  # type: ignore[operator]

    @torch.no_grad()
    def _run(self, items: set[Item]) -> None:
        for batch in self._batches(_rows(items)):
            ids, mask = _padded([row for row, _ in batch], left=False)
            logits = self.net(input_ids=ids.to(self.net.device), attention_mask=mask.to(self.net.device)).logits
            for number, (_, read_off) in enumerate(batch):
                for prompt, answer in read_off:
                    at = logits[number, len(prompt) - 1 :][: len(answer)].float().cpu()  # [answer, V]
                    wanted = torch.tensor(answer)
                    mean = at.log_softmax(-1).gather(1, wanted[:, None]).double().mean().item()
                    if not math.isfinite(mean):
                        raise ValueError(f"the model gives {mean} for {self.tokenizer.decode([*prompt, *answer])!r}")
                    self._scored[prompt, answer] = mean, bool((at.argmax(-1) == wanted).all())

    def _batches(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        vocabulary = self.net.get_output_embeddings().weight.shape[0]
        begin = 0
        while begin < len(rows):
            count = max(1, min(ROWS, LOGITS // (len(rows[begin][0]) * vocabulary)))
            yield list(rows[begin : begin + count])
            begin += count

    def write(self, questions: Sequence[Question], tokens: int, chat: bool = False) -> None:
        """Let the model write `tokens` greedily behind each prompt; fill in what it wrote and if it answered."""
        prompts = [self._chat(q.prompt) if chat else self.ids(q.prompt) for q in questions]
        ordered = sorted(range(len(questions)), key=lambda i: (-len(prompts[i]), i))
        for begin in range(0, len(ordered), ROWS):
            batch = ordered[begin : begin + ROWS]
            ids, mask = _padded([prompts[i] for i in batch], left=True)
            written = self.net.generate(
                ids.to(self.net.device),
                attention_mask=mask.to(self.net.device),
                max_new_tokens=tokens,
                do_sample=False,
            )[:, ids.shape[1] :]
            for i, row in zip(batch, written.tolist(), strict=True):
                questions[i].wrote = self.tokenizer.decode(self._until_end(row), skip_special_tokens=True)
                questions[i].said = stands_in(questions[i].right, questions[i].wrote or "")

    def _chat(self, question: str) -> list[int]:
        messages = [{"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.ids(text, special=False)

    def _until_end(self, row: list[int]) -> list[int]:
        ends = self.net.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]

    @torch.no_grad()
    def perplexity(self, text: str) -> float:
        """exp of the mean −log P of the first 20,000 tokens, in windows of 512 that BOS opens where the model has one.

        Without BOS the first token of a window has nothing before it and is not counted.
        """
        ids = self.ids(text, special=False)[:TEXT_TOKENS]
        lead = [token for token in self.ids("a")[:1] if token == self.tokenizer.bos_token_id]
        total, count = 0.0, 0
        for begin in range(0, len(ids), WINDOW):
            row = torch.tensor([[*lead, *ids[begin : begin + WINDOW]]], device=self.net.device)
            if row.shape[1] < 2:
                continue
            logits = self.net(input_ids=row).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
            count += row.shape[1] - 1
        if not count:
            raise ValueError("the text for perplexity has fewer than two tokens")
        return math.exp(total / count)


def _rows(items: set[Item]) -> list[Row]:
    """The rows to run, longest first; one that begins another is read off that one, as attention looks back only."""
    rows: list[Row] = []
    # The other way round in the order of a dictionary, a row stands right behind those that begin with it
    for item in sorted(items, key=lambda item: (*item[0], *item[1][:-1]), reverse=True):
        row = (*item[0], *item[1][:-1])
        if rows and rows[-1][0][: len(row)] == row:
            rows[-1][1].append(item)
        else:
            rows.append((row, [item]))
    return sorted(rows, key=lambda row: -len(row[0]))


def _padded(rows: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [B, T]; padding has mask 0."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return ids, mask


def stands_in(answer: str, text: str) -> bool:
    """True where the answer is in the text as whole words; case and a leading "the" make no difference."""
    found, wanted = (" ".join(unicodedata.normalize("NFC", one).casefold().split()) for one in (text, answer))
    return re.search(rf"(?<!\w){re.escape(wanted.removeprefix('the '))}(?!\w)", found) is not None


def rates(facts: Sequence[Sequence[Question]], draws: Sequence[Sequence[int]]) -> list[dict[str, float | None]]:
    """Every column but perplexity for every draw of facts (with repeats); None where nothing was asked."""
    sums = {
        name: [
            [float(value) for q in fact if q.kind == kind and (value := getattr(q, what)) is not None]
            for fact in facts
        ]
        for name, (kind, what) in RATES.items()
    }
    totals = {name: ([sum(v) for v in values], [len(v) for v in values]) for name, values in sums.items()}
    results = []
    for draw in draws:
        row: dict[str, float | None] = {}
        for name, (total, count) in totals.items():
            asked = sum(count[i] for i in draw)
            row[name] = sum(total[i] for i in draw) / asked if asked else None
        row["Score"] = _harmonic([row[name] for name in ("ES", "PS", "NS")])
        results.append(row)
    return results


def _harmonic(values: Sequence[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    if not given or min(given) == 0:
        return 0.0 if given else None
    return len(given) / sum(1 / value for value in given)


def intervals(facts: Sequence[Sequence[Question]], samples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """The middle 95 % of each column over bootstrap samples of facts, each fact with all its questions."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(facts), (samples, len(facts)), generator=generator).tolist()
    found = rates(facts, draws)
    result: dict[str, Any] = {}
    for name in found[0]:
        values = [value for row in found if (value := row[name]) is not None]
        ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
        result[name] = torch.tensor(values, dtype=torch.float64).quantile(ends).tolist() if values else None
    return result


def table(found: Mapping[str, float | None], between: Mapping[str, Any] | None = None) -> str:
    """Markdown: rates in per cent, log-probabilities and perplexity as they are, intervals in a second row."""
    names = [name for name in COLUMNS if name in found]
    rows = [names, ["---"] * len(names), [_shown(name, found[name]) for name in names]]
    if between is not None:
        rows.append([" to ".join(_shown(name, end) for end in between.get(name) or ()) for name in names])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return ""
    text = f"{value:.2f}" if name in LOGARITHMS or name == "perplexity" else f"{100 * value:.1f}"
    return text.replace("-", "−")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="directory that transformers loads")
    parser.add_argument("facts", type=Path, help="fact file (.yaml) or CounterFact (.json)")
    parser.add_argument("--text", type=Path, help="text whose perplexity is measured")
    parser.add_argument("--chat", action="store_true", help="also ask the questions of the relations in the chat form")
    parser.add_argument("--questions", type=Path, help="take the relations' questions from this fact file instead")
    parser.add_argument("--intervals", action="store_true", help="95 %% intervals, bootstrap over facts")
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write all numbers and every question here")
    given = parser.parse_args(arguments)
    if not given.checkpoint.is_dir():
        parser.error(f"{given.checkpoint} is no directory; give a checkpoint that transformers loads")
    try:
        report = judge(given)
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.exit(2, f"error: {error}\n")
    print(table(report["metrics"], report.get("intervals")))
    if given.json:
        given.json.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def judge(given: argparse.Namespace) -> dict[str, Any]:
    """Read, ask and count; raises ValueError and OSError for input that cannot be used."""
    other = questions_of(given.questions) if given.questions else None
    facts = read(given.facts, given.start, given.limit, other)
    model = Judge.load(given.checkpoint, given.dtype, given.device)
    asked = {kind: [q for fact in facts for q in fact if q.kind == kind] for kind in ("edit", *WRITTEN)}
    model.score([*asked["edit"], *asked["paraphrase"], *asked["neighbor"]])
    for kind, tokens in WRITTEN.items():
        chat = kind.startswith("chat")
        if not chat or (given.chat and model.tokenizer.chat_template):
            model.write(asked[kind], tokens, chat)
    if given.chat and not model.tokenizer.chat_template:
        print("the tokenizer has no chat template: CE and CN are left out", file=sys.stderr)
    metrics = rates(facts, [range(len(facts))])[0]
    if given.text:
        metrics["perplexity"] = model.perplexity(given.text.read_text(encoding="utf-8"))
    counts = {kind: len(questions) for kind, questions in asked.items()}
    report: dict[str, Any] = {"facts": len(facts), "asked": counts, "dtype": given.dtype, "metrics": metrics}
    if given.intervals:
        report["intervals"] = intervals(facts)
    report["questions"] = [asdict(question) for fact in facts for question in fact]
    return report


if __name__ == "__main__":
    main()
