"""Preset files: what they say, every mistake with its place, and what goes before what."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from kpatch.edit.make import make
from kpatch.edit.methods import hyper_for, method_named
from kpatch.edit.preset_file import PresetFile, TunedOn, read_preset
from kpatch.edit.presets import SHAPES, MemitHyper, MemitPaperHyper, Preset
from kpatch.errors import BadInput
from kpatch.facts.fact import Fact
from tests.support.models import LAYERS, WIDTH, tiny
from tests.support.reports import Recorder

build = cache(tiny)
MEMIT, PAPER = method_named("memit"), method_named("memit-paper")
HEX = "0123456789abcdef" * 4
WHOLE = f"""\
# by hand
version: 1
method: memit
model:
  title: tiny
  family: llama
  width: {WIDTH}
  depth: {LAYERS}
  weights: {HEX}
layers: 1-2
settings: {{leverage: 3.5, steps: 7}}
wordings: given
notes: "a note: with a colon"
measured:
  tried: [one, two]
  score: {{before: 0.5, after: 0.75}}
"""


def written(folder: Path, text: str, name: str = "p.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def wrong(folder: Path, text: str) -> list[str]:
    """The error lines of a file, without the folder's name."""
    with pytest.raises(BadInput) as caught:
        read_preset(written(folder, text))
    assert caught.value.exit_code == 2
    assert "preset file" in caught.value.message
    assert "fact" not in str(caught.value)
    assert caught.value.hint == "docs/tune.md describes the format"
    return [line.removeprefix(f"{folder}/") for line in caught.value.details]


# What a file says


def test_everything_that_a_file_can_say(tmp_path: Path) -> None:
    found = read_preset(written(tmp_path, WHOLE))
    assert found == PresetFile(
        method="memit",
        model=TunedOn("tiny", "llama", WIDTH, LAYERS, HEX),
        layers=(1, 2),
        settings={"leverage": "3.5", "steps": "7"},
        wordings="given",
        notes="a note: with a colon",
        measured={"tried": ["one", "two"], "score": {"before": "0.5", "after": "0.75"}},
    )


def test_two_keys_are_enough(tmp_path: Path) -> None:
    assert read_preset(written(tmp_path, "version: 1\nmethod: memit\n")) == PresetFile("memit")


@pytest.mark.parametrize("text", ["4-6", "4,5,6", "[4, 5, 6]", "[4-6]", '"4-5, 6"'])
def test_layers_in_several_forms(text: str, tmp_path: Path) -> None:
    found = read_preset(written(tmp_path, f"version: 1\nmethod: memit\nlayers: {text}\n"))
    assert found.layers == (4, 5, 6)


@pytest.mark.parametrize(
    "title",
    [
        "plain",
        "with: colon",
        "- dash",
        "#hash",
        "'quotes' and \"more\"",
        "{a: b}",
        "two\nlines",
        "日本語",
        "1.5",
        "true",
    ],
)
def test_what_is_written_is_read_back(title: str, tmp_path: Path) -> None:
    file = PresetFile(
        "memit",
        TunedOn(title, "llama", 8, 3, HEX),
        (0, 1, 2, 5),
        {"leverage": "2.5", "kl": "1e-05"},
        "auto",
        title,
        {
            "tried": [{"what": title, "score": "0.5", "at": "1,2"}, []],
            "a: b": {"c, d": ""},
            "none": {},
            "deep": {"er": {"list": ["1", title]}},
        },
    )
    read = read_preset(written(tmp_path, file.text()))
    assert read == file
    assert read.text() == file.text()


# Mistakes


MANY = """\
version: 2
metod: memit
model: {tittle: x, width: wide, depth: 0, weights: abc}
layers: 5-3
settings: {leverag: 1, steps: many, clamp: 0, kl: -1, lead_ins: 1.5, stop_loss: [1]}
wordings: automatic
notes: [a]
"""


def test_every_mistake_at_once_with_its_place(tmp_path: Path) -> None:
    assert wrong(tmp_path, MANY.replace("metod", "method")) == [
        "p.yaml:1:10: this kpatch reads version 1, found '2'",
        "p.yaml:3:9: unknown key 'tittle'; did you mean 'title'?",
        "p.yaml:3:27: expected a whole number above 0, found 'wide'",
        "p.yaml:3:40: expected a whole number above 0, found '0'",
        "p.yaml:3:52: expected 64 hexadecimal digits, found 'abc'",
        "p.yaml:4:9: expected layers such as 4-8 or [4, 5, 6], found '5-3'",
        "p.yaml:5:12: unknown setting 'leverag'; did you mean 'leverage'?",
        "p.yaml:5:31: The setting steps=many is not a whole number; expected one such as steps=60",
        "p.yaml:5:44: The setting clamp=0 would give no edit; expected more than 0",
        "p.yaml:5:51: The setting kl=-1 must be finite and not negative",
        "p.yaml:5:65: The setting lead_ins=1.5 is not a whole number; expected one such as lead_ins=4",
        "p.yaml:5:81: expected text, found a list",
        "p.yaml:6:11: unknown wordings 'automatic'; did you mean 'auto'?",
        "p.yaml:7:8: expected text, found a list",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "p.yaml:1:1: expected 'version:', 'method:' and settings, found nothing"),
        ("[]", "p.yaml:1:1: expected 'version:', 'method:' and settings, found a list"),
        ("{}", "p.yaml:1:1: expected 'version:', 'method:' and settings, found an empty mapping {}"),
        ("method: memit", "p.yaml:1:1: 'version' is missing"),
        ("version: 1\nmethod:", "p.yaml:2:8: 'method' is missing"),
        ("version: 1\nmethod: memmit", "p.yaml:2:9: unknown method 'memmit'; did you mean 'memit'?"),
        ("version: 1\nmethod: memit\nlayer: 4", "p.yaml:3:1: unknown key 'layer'; did you mean 'layers'?"),
        ("version: 1\nmethod: memit\nsettings: {layers: 4}", "p.yaml:3:12: unknown setting 'layers'"),
        ("version: 1\nmethod: memit\nsettings: {kl: }", "p.yaml:3:16: the setting kl has no value"),
        ("version: 1\nmethod: memit\nsettings: 4", "p.yaml:3:11: expected a mapping, found text"),
        ("version: 1\nmethod: memit\nmodel: tiny", "p.yaml:3:8: expected a mapping, found text"),
        ("version: 1\nmethod: memit\nlayers: {a: b}", "p.yaml:3:9: expected layers such as 4-8"),
        ("version: 1\nmethod: memit\nlayers: [[1]]", "p.yaml:3:9: expected layers such as 4-8"),
        ("version: 1\nmethod: memit\nlayers: 1-99999", "p.yaml:3:9: expected layers such as 4-8"),
        ("version: 1\nversion: 1\nmethod: memit", "p.yaml:2:1: the key 'version' stands here a second time"),
        ("version: 1\nmethod: !x memit", "p.yaml:2:9: tags such as '!x' have no meaning in a preset file"),
        ("version: 1\nmethod: memit\n---\na: b", "p.yaml:3:1: a second document starts here; a preset file is one"),
        ("version: 1\nmethod:\tmemit", "p.yaml:2:8: a tab; use spaces"),
        ("version: [", "this is not valid YAML"),
    ],
)
def test_one_mistake(text: str, said: str, tmp_path: Path) -> None:
    (found,) = wrong(tmp_path, text)
    assert said in found


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        read_preset(tmp_path / "p.yaml")
    with pytest.raises(BadInput, match="no kind of file that is read here"):
        read_preset(written(tmp_path, "version: 1", "p.json"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(BadInput, match="a folder, not a preset file"):
        read_preset(tmp_path / "folder.yaml")
    (tmp_path / "p.yaml").write_bytes(b"version: \xff")
    with pytest.raises(BadInput, match="preset file has 1 error"):
        read_preset(tmp_path / "p.yaml")


# What goes before what


def preset(tmp_path: Path, more: str = "", method: str = "memit") -> PresetFile:
    return read_preset(written(tmp_path, f"version: 1\nmethod: {method}\n{more}"))


def test_the_file_goes_before_the_defaults_and_after_what_is_asked_for(tmp_path: Path) -> None:
    model, file = build("llama"), preset(tmp_path, "layers: 0-1\nsettings: {clamp: 0.25, steps: 7}\n")
    assert hyper_for(MEMIT, model, None, {}, file=file) == MemitHyper((0, 1), clamp=0.25, steps=7, chat=0)
    assert hyper_for(MEMIT, model, [2], {"steps": "9"}, file=file) == MemitHyper((2,), clamp=0.25, steps=9, chat=0)


def test_the_file_goes_before_the_methods_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = MemitPaperHyper(layers=(0, 2), clamp=0.4, steps=3)
    monkeypatch.setitem(SHAPES, "smollm2", ("llama", WIDTH, LAYERS))
    monkeypatch.setattr(type(PAPER), "presets", {"smollm2": Preset(own, "made for this test")})
    model = build("llama")
    file = preset(tmp_path, "settings: {steps: 7}\n", "memit-paper")
    assert hyper_for(PAPER, model, None, {}, file=file) == MemitPaperHyper((0, 2), clamp=0.4, steps=7)
    file = preset(tmp_path, "layers: 1\n", "memit-paper")
    assert hyper_for(PAPER, model, None, {}, file=file) == MemitPaperHyper((1,), clamp=0.4, steps=3)


def test_a_file_without_layers_leaves_them_to_the_method(tmp_path: Path) -> None:
    model = build("llama")
    plain = hyper_for(MEMIT, model, None, {})
    assert hyper_for(MEMIT, model, None, {}, file=preset(tmp_path)) == plain


def test_what_was_taken_is_told(tmp_path: Path) -> None:
    notes = Recorder()
    hyper_for(MEMIT, build("llama"), None, {}, notes, read_preset(written(tmp_path, WHOLE)))
    assert notes.notes == [
        f"preset file {tmp_path / 'p.yaml'}, tuned on tiny",
        "it sets layers 1-2, leverage 3.5, steps 7",
    ]


def test_another_model_is_a_note(tmp_path: Path) -> None:
    notes = Recorder()
    file = preset(tmp_path, "model: {title: big, family: gptj, width: 4096, depth: 28}\nlayers: 1\n")
    assert hyper_for(MEMIT, build("llama"), None, {}, notes, file).layers == (1,)
    assert notes.warnings == []
    told = f"family gptj, not llama; width 4096, not {WIDTH}; depth 28, not {LAYERS}"
    assert notes.notes[-1].endswith(f"was tuned on another model than {build('llama').name}: {told}")


@pytest.mark.parametrize(
    ("layers", "said"), [("3-9", "names layer 9, and .* ends with layer 3"), ("2-3", "Layer 3 is the last of")]
)
def test_layers_that_the_model_lacks(layers: str, said: str, tmp_path: Path) -> None:
    file = preset(tmp_path, f"layers: {layers}\n")
    with pytest.raises(BadInput, match=said) as caught:
        hyper_for(MEMIT, build("llama"), None, {}, file=file)
    assert caught.value.where == f"{tmp_path / 'p.yaml'}:3:9"
    assert caught.value.hint
    assert hyper_for(MEMIT, build("llama"), [1], {}, file=file).layers == (1,), "other layers help"


def test_a_method_that_differs_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "version: 1\nmethod: memit-paper\nlayers: 1\n")
    with pytest.raises(BadInput, match="is for memit-paper, and `method` is rome"):
        make([Fact("Rome", "{} is", "big")], out=tmp_path / "x.patch", model="nowhere", method="rome", preset=path)
