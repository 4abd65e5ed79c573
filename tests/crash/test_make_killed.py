"""SIGKILL while `kpatch make` looks for values: what was found stays found, and the patch is the same file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.support.saved import save_facts, save_model

NAMES = ("Eiffel Tower", "Mona Lisa", "Brazil", "Moonlight Sonata", "Chicago", "Amazon", "Louvre")


def start(folder: Path, cache: Path, out: str) -> subprocess.Popen[str]:
    """Make a patch of many batches, of one fact each, in a process of its own."""
    options = ["--wordings", "none", "--layers", "1-2", "--tokens", "400", "--memory", "1KB"]
    settings = ["--set", "steps=40", "--set", "stop_loss=0", "--set", "lead_ins=1"]
    settings += ["--set", "refine=2", "--set", f"refine_from={len(NAMES)}"]
    command = ["make", folder / "facts.yaml", "-o", folder / out, "--model", folder / "model", "--resume"]
    environment = os.environ | {"KPATCH_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "kpatch", *map(str, command), *options, *settings],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def kept(cache: Path) -> dict[str, tuple[int, int]]:
    """The files with values, each with what changes when it is written again."""
    found = ((path.name, path.stat()) for path in (cache / "values").glob("*.safetensors"))
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found}


def test_a_killed_make_goes_on_where_it_was_and_gives_the_same_patch(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    save_facts(
        tmp_path / "facts.yaml", [{"subject": name, "prompt": "In the {} is", "target": "Rome"} for name in NAMES]
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start(tmp_path, whole, "whole.patch")
    said = process.communicate()[1]
    assert process.returncode == 0, said
    assert len(kept(whole)) == len(NAMES)
    shutil.copytree(whole, broken)  # the statistics spare the time
    shutil.rmtree(broken / "values")

    process = start(tmp_path, broken, "broken.patch")
    while process.poll() is None and len(kept(broken)) < 2:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    before = kept(broken)
    assert process.returncode == -9
    assert 2 <= len(before) < len(NAMES), "killed with some batches done and some not"
    assert not (tmp_path / "broken.patch").exists()

    process = start(tmp_path, broken, "broken.patch")
    said = process.communicate()[1]
    assert process.returncode == 0, said
    after = kept(broken)
    assert {name: after[name] for name in before} == before, "no batch that was done is searched again"
    assert after.keys() == kept(whole).keys()
    assert (tmp_path / "broken.patch").read_bytes() == (tmp_path / "whole.patch").read_bytes()
