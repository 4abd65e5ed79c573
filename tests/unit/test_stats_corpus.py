"""Files and datasets as text, and text as rows of ids."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kpatch.errors import BadInput
from kpatch.models.model import Model
from kpatch.stats.corpus import open_corpus, pack, row_start
from kpatch.stats.text import open_text
from tests.support.models import tiny
from tests.support.tokenizers import byte_level, metaspace

TEXT = "The first <unk> line .\nstill the first @-@ one\n\n \n= Title =\n\nThe last, without an end"


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def test_a_text_file_is_read_as_it_is(tmp_path: Path) -> None:
    corpus = open_corpus(write(tmp_path, "a.txt", TEXT))
    paragraphs = list(corpus.documents())
    assert "".join(paragraphs) == TEXT
    assert len(paragraphs) == 4
    assert list(corpus.documents()) == paragraphs  # from the start again
    assert corpus.name == "a.txt"


def test_a_text_without_blank_lines_is_cut_at_line_ends(tmp_path: Path) -> None:
    text = "some words of a line\n" * 20_000
    parts = list(open_corpus(write(tmp_path, "a.txt", text)).documents())
    assert "".join(parts) == text
    assert len(parts) > 4
    assert all(part.endswith("\n") for part in parts)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert list(open_corpus(write(tmp_path, "a.txt", b"\xef\xbb\xbfword")).documents()) == ["word"]


def test_identity_is_content_not_place(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    one, same = write(tmp_path, "a.txt", TEXT), write(tmp_path / "b", "other.txt", TEXT)
    assert open_corpus(one).identity == open_corpus(same).identity
    assert open_corpus(one).identity != open_corpus(write(tmp_path, "c.txt", TEXT + "!")).identity
    assert open_corpus(one).identity != open_corpus(write(tmp_path, "a.jsonl", TEXT)).identity


def test_json_lines(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text, "id": 1}) for text in ("one\ntwo", "Łódź")]
    corpus = open_corpus(write(tmp_path, "a.jsonl", lines[0] + "\n\n" + lines[1] + "\n"))
    assert list(corpus.documents()) == ["one\ntwo\n\n", "Łódź\n\n"]


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"text": ', "not JSON"), ('{"txt": "a"}', "has no text"), ('{"text": 5}', "has no text"), ("[1]", "no text")],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    corpus = open_corpus(write(tmp_path, "a.jsonl", '{"text": "fine"}\n' + line + "\n"))
    with pytest.raises(BadInput, match=message) as caught:
        list(corpus.documents())
    assert caught.value.where == "a.jsonl:2"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_in_another_encoding_is_refused(tmp_path: Path, name: str) -> None:
    corpus = open_corpus(write(tmp_path, name, b'{"text": "a"}\n{"text": "\xe9t\xe9"}\n'))
    with pytest.raises(BadInput, match="not UTF-8"):
        list(corpus.documents())


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ["one", None, "three"]}), tmp_path / "a.parquet")
    assert list(open_corpus(str(tmp_path / "a.parquet")).documents()) == ["one\n\n", "three\n\n"]
    parquet.write_table(pyarrow.table({"body": ["one"]}), tmp_path / "b.parquet")
    with pytest.raises(BadInput, match="no column 'text'") as caught:
        list(open_corpus(str(tmp_path / "b.parquet")).documents())
    assert caught.value.details == ("found body",)
    with pytest.raises(BadInput, match="no parquet file"):
        list(open_corpus(write(tmp_path, "c.parquet", b"PAR1 but not really")).documents())


def test_parquet_and_hub_name_the_extra_that_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for open_it in (
        lambda: list(open_corpus(write(tmp_path, "a.parquet", b"")).documents()),
        lambda: open_corpus("owner/name"),
    ):
        with pytest.raises(BadInput, match="needs the package") as caught:
            open_it()
        assert "kpatch[corpus]" in str(caught.value.hint)


def test_what_is_no_corpus_is_refused(tmp_path: Path) -> None:
    for name in (str(tmp_path / "missing.txt"), "missing.jsonl", "./owner/name", "owner/name/more", "a b"):
        with pytest.raises(BadInput, match="not found"):
            open_corpus(name)
    with pytest.raises(BadInput, match="folder"):
        open_corpus(str(tmp_path))
    with pytest.raises(BadInput, match="unknown kind"):
        open_corpus(write(tmp_path, "a.csv", "text\n"))


class Hub:
    """Stands for the hub and the library that reads it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]] | Exception) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.rows = rows
        module = ModuleType("datasets")
        module.load_dataset = self.load_dataset  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)
        monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", self.dataset_info)

    def dataset_info(self, repo: str, revision: str | None = None) -> Any:
        if isinstance(self.rows, ConnectionError):
            raise self.rows
        self.asked.append(("info", repo, revision))
        return SimpleNamespace(sha="c0ffee")

    def load_dataset(self, repo: str, config: str | None, **options: Any) -> list[dict[str, Any]]:
        self.asked.append((repo, config, options["split"], options["revision"], options["streaming"]))
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


def test_a_hub_dataset_is_streamed_at_one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, [{"text": "one"}, {"text": "two"}])
    corpus = open_corpus("owner/name:part@main")
    assert list(corpus.documents()) == ["one\n\n", "two\n\n"]
    assert hub.asked == [("info", "owner/name", "main"), ("owner/name", "part", "train", "c0ffee", True)]
    assert corpus.name == "owner/name:part"
    assert "c0ffee" in corpus.identity
    commit = "0123456789" * 4
    open_corpus(f"owner/name@{commit}")
    assert len(hub.asked) == 2  # a commit needs no question


def test_what_the_hub_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    Hub(monkeypatch, ConnectionError("no route"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(BadInput, match="could not be read from the hub") as caught:
        open_corpus("owner/name")
    assert caught.value.details == ("ConnectionError: no route",)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BadInput) as caught:
        open_corpus("owner/name")
    assert caught.value.details == ("HF_HUB_OFFLINE is set",)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    Hub(monkeypatch, RuntimeError("Dataset 'x' has scripts"))
    with pytest.raises(BadInput, match="could not be read from the hub"):
        list(open_corpus("owner/name").documents())
    Hub(monkeypatch, [{"body": "x"}])
    with pytest.raises(BadInput, match="no column 'text'"):
        list(open_corpus("owner/name").documents())


@pytest.fixture(scope="module", params=[byte_level(bos=False), byte_level(bos=True), metaspace(bos=True)])
def model(request: pytest.FixtureRequest) -> Model:
    return tiny("llama", tokenizer=request.param)


DOCUMENTS = ["The capital of France is Paris. " * 3, "", "Chicago is a city. \n\n", "東京は日本の首都です。"] * 20


def test_rows_hold_the_texts_without_padding(model: Model) -> None:
    start = row_start(model)
    assert start == ([model.tokenizer.bos_token_id] if model.adds_bos else [])
    tokens, row = 203, 16
    packed = pack(model, DOCUMENTS, tokens, row)
    assert packed.shape == (tokens,)
    rows = [packed[at : at + row].tolist() for at in range(0, tokens, row)]
    assert all(one[: len(start)] == start for one in rows)
    found = [token for one in rows for token in one[len(start) :]]
    expected = [token for text in DOCUMENTS for token in model.tokenizer(text, add_special_tokens=False).input_ids]
    assert found == expected[: len(found)]


def test_a_row_does_not_depend_on_how_many_follow(model: Model) -> None:
    long = pack(model, DOCUMENTS, 230, 16)
    for tokens in (1, 15, 16, 17, 32, 33, 100):
        assert torch.equal(pack(model, DOCUMENTS, tokens, 16), long[:tokens])


def test_too_little_text_says_how_much_there_is(model: Model) -> None:
    with pytest.raises(BadInput, match="less text than asked for") as caught:
        pack(model, DOCUMENTS[:2], 10_000, 16, "a.txt")
    assert caught.value.where == "a.txt"
    expected, found = caught.value.details
    assert expected == "expected 10,000 tokens"
    most = int(found.removeprefix("found ").replace(",", ""))
    assert f"`tokens={most}` " in str(caught.value.hint)
    assert pack(model, DOCUMENTS[:2], most, 16).shape == (most,)
    with pytest.raises(BadInput):
        pack(model, DOCUMENTS[:2], most + 1, 16)


def test_no_text_at_all_is_too_little(model: Model) -> None:
    with pytest.raises(BadInput, match="less text"):
        pack(model, [], 16, 16)


def test_text_is_read_no_further_than_needed(model: Model) -> None:
    read = 0

    def documents():  # type: ignore[no-untyped-def]
        nonlocal read
        while True:
            read += 1
            yield "word " * 50

    pack(model, documents(), 100, 16)
    assert read <= 256


def test_the_beginning_of_a_corpus_is_kept_for_what_wants_no_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without the hub too, once the covariance has read it; more than was kept is read anew."""
    monkeypatch.setenv("KPATCH_CACHE", str(tmp_path))
    monkeypatch.setattr("kpatch.stats.text._KEPT", 100)
    hub = Hub(monkeypatch, [{"text": text} for text in DOCUMENTS])
    model, name = tiny("llama"), f"owner/name@{'0123456789' * 4}"
    whole = open_text(model, name, 230).ids()
    hub.rows = ConnectionError("no route")
    for tokens in (16, 100):
        assert torch.equal(open_text(model, name, tokens).ids(), whole[:tokens])
    with pytest.raises(BadInput, match="could not be read from the hub"):
        open_text(model, name, 101).ids()
