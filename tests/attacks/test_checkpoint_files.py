"""Checkpoint directories that are wrong: refused with the right exit code, in words, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kpatch.checkpoint.apply import apply
from kpatch.checkpoint.fit import base_weights, verify_fit
from kpatch.checkpoint.records import VERSION
from kpatch.checkpoint.recover import recover
from kpatch.checkpoint.revert import revert
from kpatch.checkpoint.shards import open_checkpoint
from kpatch.checkpoint.status import status
from kpatch.errors import BadInput, CheckFailed, Damaged, KpatchError, Refused
from tests.support.checkpoints import WEIGHTS, make_checkpoint, make_patch, snapshot
from tests.support.reports import Recorder

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path / "model", sharded=True)
    make_patch(tmp_path / "a.patch", tmp_path / "model")
    return tmp_path / "model"


def refused(model: Path, *kinds: type[KpatchError], patch: Path | None = None) -> KpatchError:
    """Apply and status must refuse, or status may still look; everything around must stay as it is."""
    around = model.parent
    before = snapshot(around)
    with pytest.raises(kinds) as caught:
        apply([patch or around / "a.patch"], model)
    for look in (status, lambda path: apply([around / "a.patch"], path, check=True)):
        with suppress(*kinds):
            look(model)
    assert snapshot(around) == before
    text = "\n".join((caught.value.message, *caught.value.details, caught.value.hint or ""))
    assert not any(ord(c) < 32 and c != "\n" for c in text)
    return caught.value


def change_index(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads((model / INDEX).read_text())
    change(value)
    (model / INDEX).write_text(json.dumps(value))


@pytest.mark.parametrize(
    "name",
    ["../other/model.safetensors", "/etc/model.safetensors", "C:\\x\\model.safetensors", "C:model.safetensors", "..",
     "sub/model.safetensors", "a\0.safetensors", "pytorch_model.bin", "", "x\n.safetensors", "~/../a.safetensors/"],
)  # fmt: skip
def test_an_index_cannot_lead_out_of_its_directory(model: Path, name: str) -> None:
    shutil.copytree(model, model.parent / "other")
    change_index(model, lambda index: index["weight_map"].update({WEIGHTS[0]: name}))
    assert "points outside" in refused(model, Refused).message


def test_an_index_that_does_not_match_its_files_is_refused(model: Path) -> None:
    original = (model / INDEX).read_text()
    changes: dict[str, tuple[Callable[[dict[str, Any]], object], type[KpatchError], str]] = {
        "missing file": (lambda v: v["weight_map"].update(x="model-9.safetensors"), BadInput, "not there"),
        "wrong shard": (lambda v: v["weight_map"].update({WEIGHTS[1]: FIRST}), Damaged, "does not match"),
        "no such tensor": (lambda v: v["weight_map"].update(ghost=FIRST), Damaged, "does not match"),
        "no map": (lambda v: v.pop("weight_map"), Damaged, "no weight_map"),
        "empty map": (lambda v: v["weight_map"].clear(), Damaged, "no weight_map"),
        "numbers": (lambda v: v["weight_map"].update(x=3), Damaged, "no weight_map"),
    }
    for change, kind, words in changes.values():
        change_index(model, change)
        assert words in refused(model, kind).message
        (model / INDEX).write_text(original)
    for text in ("", "{", "[]", "null", '{"weight_map":{"a":"x","a":"y"}}', "[" * 9999, "\ud800"):
        (model / INDEX).write_bytes(text.encode("utf-8", "surrogatepass"))
        refused(model, Damaged)
    (model / INDEX).unlink()
    (model / INDEX).symlink_to("nowhere")
    refused(model, BadInput)


def test_a_tensor_in_two_shards_counts_where_the_index_and_transformers_agree(model: Path) -> None:
    """transformers reads the shards in the order of their names, so the last one wins whatever the index says."""
    second = "model-00002-of-00003.safetensors"
    tensors = load_file(model / FIRST)
    save_file({**tensors, WEIGHTS[1]: torch.zeros(8, 12)}, model / FIRST)
    apply([model.parent / "a.patch"], model)  # the index names the second, as it should
    revert(model)
    change_index(model, lambda index: index["weight_map"].pop(WEIGHTS[1]))
    error = refused(model, Damaged)
    assert "stands in two files" in error.message
    assert error.details == (f"{FIRST} and {second}",)
    change_index(model, lambda index: index["weight_map"].update({WEIGHTS[1]: FIRST}))
    error = refused(model, Refused)
    assert "does not fit" in error.message
    assert "stands in two files" in error.details[0]
    make_patch(model.parent / "other.patch", model, weights=WEIGHTS[:1], seed=9)
    heard = Recorder()
    apply([model.parent / "other.patch"], model, report=heard)
    assert "1 tensors" in heard.warnings[0]


# What the whole model and its text part say of the head, and whether it is the embeddings; the whole counts first
HEADS = [(True, None, True), (None, None, True), (False, None, False), (True, False, True), (False, True, False)]


@pytest.mark.parametrize(("whole", "text", "tied"), [*HEADS, (None, False, False)])
def test_a_listed_head_that_no_shard_holds(model: Path, whole: bool | None, text: bool | None, tied: bool) -> None:
    change_index(model, lambda index: index["weight_map"].update({"lm_head.weight": FIRST}))
    outer, inner = ({} if one is None else {"tie_word_embeddings": one} for one in (whole, text))
    (model / "config.json").write_text(json.dumps({"model_type": "llama", **outer, "text_config": inner}))
    if tied:
        apply([model.parent / "a.patch"], model)
    else:
        assert "found in no listed file" in refused(model, Damaged).details[0]


def test_what_is_no_checkpoint_is_named(model: Path) -> None:
    around = model.parent
    (around / "bare").mkdir()
    assert "no checkpoint directory" in refused(around / "bare", BadInput).message
    assert "no checkpoint directory" in refused(around / "missing", BadInput).message
    assert "directory that holds it" in (refused(model / FIRST, BadInput).hint or "")
    assert "is a file" in refused(around / "a.patch", BadInput).message
    refused(around / "nul\0", BadInput)
    (around / "loop").symlink_to("loop")
    refused(around / "loop", BadInput)
    (around / "m.gguf").write_bytes(b"GGUF")
    assert "GGUF" in refused(around / "m.gguf", Refused).message
    (around / "bare" / "m.gguf").write_bytes(b"GGUF")
    assert "export" in (refused(around / "bare", Refused).hint or "")
    (around / "bare" / "pytorch_model-00001-of-00002.bin").write_bytes(b"PK")
    assert "how they belong together" in refused(around / "bare", Refused).message
    assert "save_pretrained" in (refused(around / "bare", Refused).hint or "")
    (around / "single").mkdir()
    shutil.copy(model / FIRST, around / "single" / "consolidated.safetensors")
    assert "consolidated" in refused(around / "single", BadInput).details[0]
    shutil.copy(model / FIRST, model / "model.safetensors")
    assert "both" in refused(model, BadInput).message


def test_quantized_checkpoints_are_refused_with_the_reason(model: Path) -> None:
    (model / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4}}')
    error = refused(model, Refused)
    assert "quantized (gptq)" in error.message
    assert "codes and scales" in error.details[0]
    (model / "config.json").write_text("{}")
    tensors = load_file(model / FIRST)
    save_file({**tensors, WEIGHTS[0]: tensors[WEIGHTS[0]].T.contiguous()}, model / FIRST)
    assert "shape" in refused(model, Refused).details[0]
    save_file({**tensors, "mask": torch.ones(3, dtype=torch.int8), "empty": torch.ones(0, 3)}, model / FIRST)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {"mask": FIRST, "empty": FIRST}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("mask", "empty"):
        with pytest.raises(BadInput, match="of shape"):
            base_weights(model, [name])


@pytest.mark.parametrize(
    ("suffix", "said"),
    [
        ("qweight", "GPTQ or AWQ"),
        ("qzeros", "GPTQ or AWQ"),
        ("weight.absmax", "bitsandbytes 4-bit"),
        ("weight.quant_state.bitsandbytes__nf4", "bitsandbytes 4-bit"),
        ("SCB", "bitsandbytes 8-bit"),
        ("weight_packed", "compressed or float8"),
        ("weight_scale_inv", "compressed or float8"),
        ("W_q", "HQQ"),
        ("weight._data", "quanto"),
    ],
)
def test_quantized_checkpoints_are_known_by_their_tensors(model: Path, suffix: str, said: str) -> None:
    """Also where the config says nothing of it, and where the patched weights themselves are plain."""
    extra = {f"model.layers.0.self_attn.q_proj.{suffix}": torch.zeros(2, 2, dtype=torch.uint8)}
    change_index(model, lambda index: index["weight_map"].update(dict.fromkeys(extra, FIRST)))
    save_file({**load_file(model / FIRST), **extra}, model / FIRST)
    assert said in refused(model, Refused).message
    with pytest.raises(Refused, match="quantized"):
        verify_fit(model.parent / "a.patch", model)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int32, "I32"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", [WEIGHTS[0], "model.layers.0.self_attn.q_proj.weight"], ids=["patched", "other"])
def test_codes_without_scales_are_known_by_how_they_are_stored(
    model: Path, dtype: torch.dtype, stored: str, name: str
) -> None:
    """Whichever weight it is: what the whole network computes with codes is not what the patch was made for."""
    tensors = load_file(model / FIRST)
    coded = tensors.get(name, torch.ones(4, 4)).to(dtype)
    if dtype == torch.int32:
        coded = tensors.get(name, torch.ones(4, 4)).view(dtype)  # the very bytes that the patch was made for
    change_index(model, lambda index: index["weight_map"].update({name: FIRST}))
    save_file({**tensors, name: coded}, model / FIRST)
    assert f"is quantized (tensor {name} is stored as {stored})" in refused(model, Refused).message
    for action in (verify_fit, lambda patch, path: base_weights(path, WEIGHTS[1:2])):
        with pytest.raises(Refused, match="is quantized"):
            action(model.parent / "a.patch", model)


def test_masks_and_positions_of_whole_numbers_are_no_weights(model: Path) -> None:
    extra = {"model.layers.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8), "ids": torch.arange(4)}
    change_index(model, lambda index: index["weight_map"].update(dict.fromkeys(extra, FIRST)))
    save_file({**load_file(model / FIRST), **extra}, model / FIRST)
    apply([model.parent / "a.patch"], model)


def test_a_text_model_inside_another_is_known_as_quantized(model: Path) -> None:
    config = {"text_config": {"quantization_config": {"quant_method": "awq"}}}
    (model / "config.json").write_text(json.dumps(config))
    assert "quantized (awq)" in refused(model, Refused).message


def test_another_tokenizer_or_config_is_no_other_base(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"changed": true}')
    (model / "config.json").write_text('{"model_type": "llama", "changed": true}')
    apply([model.parent / "a.patch"], model)
    assert status(model).state == "clean"


@pytest.mark.parametrize("damage", ["cut", "grown", "header", "empty", "text", "huge", "twice"])
def test_a_damaged_weight_file_is_refused(model: Path, damage: str) -> None:
    raw = (model / FIRST).read_bytes()
    name = json.dumps(WEIGHTS[0]).encode()
    (length,) = struct.unpack("<Q", raw[:8])
    doubled = raw[8 : 8 + length].rstrip()[:-1] + b"," + name + b":{}}"
    contents = {
        "cut": raw[:-1],
        "grown": raw + b"\0",
        "header": raw.replace(b'"F32"', b'"F16"', 1),
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\n",
        "huge": struct.pack("<Q", 2**63) + raw[8:],
        "twice": struct.pack("<Q", len(doubled)) + doubled + raw[8 + length :],
    }
    (model / FIRST).write_bytes(contents[damage])
    refused(model, Damaged)


def test_weight_files_that_are_no_files_are_refused(model: Path) -> None:
    (model / FIRST).unlink()
    os.mkfifo(model / FIRST)
    with pytest.raises(Damaged, match="sound"):
        open_checkpoint(model)
    for target in ("nowhere", FIRST):
        (model / FIRST).unlink()
        (model / FIRST).symlink_to(target)
        with pytest.raises(BadInput, match="cannot be read"):
            open_checkpoint(model)


def test_names_cannot_steer_the_terminal(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model")
    make_patch(tmp_path / "a.patch", tmp_path / "model")
    evil = tmp_path / "\x1b[2J"
    make_checkpoint(evil, seed=9)
    assert "\\x1b" in refused(evil, Refused).message
    assert "\x1b" not in str(status(evil).to_dict())


def test_a_dtype_cannot_steer_the_terminal(model: Path) -> None:
    path = model / FIRST
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header[WEIGHTS[0]]["dtype"] = "\x1b[2J"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    details = refused(model, Refused).details
    assert "\\x1b" in str(details)
    assert "\x1b" not in "".join(details)


@pytest.mark.parametrize("name", ["", "base", "patches", "stage"])
def test_a_store_that_leads_elsewhere_is_refused(model: Path, name: str) -> None:
    apply([model.parent / "a.patch"], model)
    elsewhere = model.parent / "elsewhere"
    path = model / ".kpatch" / name
    if path.exists():
        path.rename(elsewhere)
    else:
        elsewhere.mkdir()
    path.symlink_to(elsewhere)
    before = snapshot(model.parent)
    for action in (lambda: revert(model), lambda: status(model), lambda: recover(model)):
        with pytest.raises(Refused, match="not a folder of kpatch's own"):
            action()
    assert snapshot(model.parent) == before
    path.unlink()
    path.write_text("a file")
    with pytest.raises(Refused):
        revert(model)


RECORDS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no version": lambda v: v.pop("version"),
    "no patches": lambda v: v.pop("patches"),
    "an id that climbs": lambda v: v["patches"][0].update(id="../../x"),
    "a hash that climbs": lambda v: v["weights"][WEIGHTS[0]].update(base="../../etc/passwd"),
    "a hash that is none": lambda v: v["weights"][WEIGHTS[0]].update(after=None),
    "weights as a list": lambda v: v.update(weights=[]),
    "patches as text": lambda v: v.update(patches="abc"),
    "base": lambda v: v.update(base=["x"]),
    "dtype": lambda v: v["weights"][WEIGHTS[0]].update(dtype="I8"),
    "parents": lambda v: v["patches"][0].update(parents=["x"]),
    "more facts than can be written again": lambda v: v["patches"][0].update(facts=1e300),
    "facts as text": lambda v: v["patches"][0].update(facts="9" * 400),
    "a shape with a fraction": lambda v: v["weights"][WEIGHTS[0]].update(shape=[1.5, 2]),
    "a weight that no patch changes": lambda v: v["weights"][WEIGHTS[0]].update(patches=[]),
    "a weight that an unknown patch changes": lambda v: v["weights"][WEIGHTS[0]].update(patches=["00" * 32]),
    "a patch twice": lambda v: v["patches"].append(v["patches"][0]),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_that_were_meddled_with_are_damage(model: Path, name: str) -> None:
    apply([model.parent / "a.patch"], model)
    path = model / ".kpatch" / "applied.json"
    value = json.loads(path.read_text())
    RECORDS[name](value)
    path.write_text(json.dumps(value))
    before = snapshot(model)
    for action in (lambda: revert(model), lambda: status(model), lambda: revert(model, all=True)):
        with pytest.raises(Damaged, match=r"applied\.json is damaged"):
            action()
    assert snapshot(model) == before


def test_records_of_a_later_kpatch_are_left_alone(model: Path) -> None:
    apply([model.parent / "a.patch"], model)
    path = model / ".kpatch" / "applied.json"
    path.write_text(path.read_text().replace('"version":1', f'"version":{VERSION + 1}'))
    with pytest.raises(Refused, match="later kpatch"):
        revert(model)
    for text in ("", "[]", "{", "\x00"):
        path.write_text(text)
        with pytest.raises(Damaged):
            status(model)


@pytest.mark.parametrize("name", ["../victim.safetensors", "/tmp/x.safetensors", "config.json", "a/b.safetensors"])
def test_a_journal_cannot_name_other_files(model: Path, name: str) -> None:
    victim = model.parent / "victim.safetensors"
    victim.write_text("mine")
    (model / ".kpatch" / "stage").mkdir(parents=True)
    (model / ".kpatch" / "stage" / "x.new").write_text("evil")
    journal = {
        **{"version": 1, "action": "apply", "patches": [], "files": {name: 4}},
        "applied": {"version": 1, "base": None, "patches": [], "weights": {}},
    }
    (model / ".kpatch" / "journal.json").write_text(json.dumps(journal))
    before = snapshot(model.parent)
    with pytest.raises(Damaged):
        recover(model)
    refused(model, Damaged)
    assert {n: v for n, v in snapshot(model.parent).items() if not n.endswith(("lock", ".holder"))} == before
    assert victim.read_text() == "mine"


def test_fit_is_a_question_with_an_answer(model: Path) -> None:
    fit = verify_fit(model.parent / "a.patch", model)
    assert fit.ok
    assert {weight.how for weight in fit.weights} == {"same bytes"}
    other = make_checkpoint(model.parent / "other", seed=40)
    fit = verify_fit(model.parent / "a.patch", other)
    assert not fit.ok
    assert isinstance(fit.error(CheckFailed), CheckFailed)
    apply([model.parent / "a.patch"], model)
    assert verify_fit(model.parent / "a.patch", model).ok  # of the weights without patches
    assert base_weights(model, WEIGHTS) == base_weights(make_checkpoint(model.parent / "again"), WEIGHTS)
