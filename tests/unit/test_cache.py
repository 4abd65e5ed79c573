"""The cache folder: where it is, whole files or none, one writer at a time, and what a full disk says."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kpatch.cache import atomic_directory, atomic_write, cache_dir, cache_root, lock
from kpatch.errors import KpatchError, Refused
from kpatch.reporter import Silent


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"HF_HOME": "/h"},
        {"XDG_CACHE_HOME": "/x"},
        {"HF_ASSETS_CACHE": "/a"},
        {"HF_HOME": "~/h", "XDG_CACHE_HOME": "/x"},
    ],
    ids=str,
)
def test_the_root_is_the_hub_s_folder_for_other_libraries(names: dict[str, str]) -> None:
    code = (
        "from huggingface_hub.constants import HF_ASSETS_CACHE as hub\nfrom pathlib import Path\n"
        "from kpatch.cache import cache_root\nprint(cache_root() == Path(hub).expanduser() / 'kpatch')"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "KPATCH_"))}
    env = {**kept, **names, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_kpatch_cache_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KPATCH_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    assert cache_dir("a", "b").is_dir()


def test_a_cache_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("KPATCH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(KpatchError) as caught:
        cache_dir("x")
    assert "KPATCH_CACHE" in (caught.value.hint or "")


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old", encoding="utf-8")
    atomic_write(path, lambda temporary: _fill(temporary, "new"))
    assert path.read_text(encoding="utf-8") == "new"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "x"
    path.write_text("old", encoding="utf-8")

    def write(temporary: Path) -> None:
        _fill(temporary, "half")
        raise error

    with pytest.raises(type(error)):
        atomic_write(path, write)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("IoError: No space left on device (os error 28)")],
)
def test_a_full_disk_is_said_in_words(error: Exception) -> None:
    def write(temporary: Path) -> None:
        raise error

    with pytest.raises(KpatchError, match="No space left") as caught:
        atomic_write(cache_dir() / "x", write)
    assert "KPATCH_CACHE" in (caught.value.hint or "")


def test_a_really_full_disk() -> None:
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("no /dev/full here")

    def write(temporary: Path) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    with pytest.raises(KpatchError, match="No space left"):
        atomic_write(cache_dir() / "x", write)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with lock(path):
        with pytest.raises(Refused) as caught, lock(path, wait=False):
            pytest.fail("two hold it")
        assert str(os.getpid()) in caught.value.details[0]
    with lock(path, wait=False):
        pass
    assert not path.with_name("x.lock.holder").exists()


def test_who_waits_says_for_whom(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom kpatch.cache import lock\n"
        "with lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(0.5)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    notes = Notes()
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], env=env, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with lock(path, report=notes):
            pass
    assert str(child.pid) in notes.notes[0]


def _fill(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    goal = tmp_path / "made"
    goal.mkdir()  # an empty one will do
    with atomic_directory(goal) as folder:
        (folder / "a").write_text("1", encoding="utf-8")
        (folder / "a").chmod(0o600)
        assert not (goal / "a").exists()
    assert (goal / "a").read_text(encoding="utf-8") == "1"
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a").write_text("1", encoding="utf-8")
    for name in ("", "a"):  # as readable as any file of this user
        assert (goal / name).stat().st_mode == (tmp_path / "plain" / name).stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "plain"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("stop")])
def test_a_folder_that_fails_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    def fill() -> None:
        with atomic_directory(tmp_path / "made") as folder:
            (folder / "a").write_text("1", encoding="utf-8")
            raise error

    with pytest.raises(KpatchError if isinstance(error, OSError) else ValueError, match=r"space|stop"):
        fill()
    assert list(tmp_path.iterdir()) == []
