"""A model on the Hugging Face hub → a snapshot in the hub's own cache, and the commit it is of."""

from __future__ import annotations

import re
import threading
from pathlib import Path

from kpatch.cache import is_full, write_error
from kpatch.errors import BadInput
from kpatch.reporter import SILENT, Reporter

_PLAIN = re.compile(r"model(-\d+-of-\d+)?\.safetensors")  # and not model.fp16.safetensors


def hub_snapshot(
    repo: str, revision: str | None, near: list[str], report: Reporter = SILENT
) -> tuple[Path, str | None]:
    """A repository's config, safetensors and tokenizer files in the hub's own cache, and the commit they are of.

    `near` are aliases that the address may have been meant for. HF_HUB_OFFLINE and the hub's other settings hold.
    Raises BadInput where the repository or revision does not exist, is gated, has no safetensors, or is out of reach.
    """
    import huggingface_hub as hub
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        info = hub.HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=20)
    except Exception as error:  # its network errors have no base of their own
        refused = _hub_error(error, repo, revision, near)
        if refused is not None:
            raise refused from error
        return _cached_snapshot(repo, revision, near, error)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    wanted = _wanted(set(sizes))
    if not any(name.endswith(".safetensors") for name in wanted):
        raise BadInput(
            f"{repo} has no safetensors weights" + (f" at revision {revision}" if revision else ""),
            details=[f"found {name}" for name in sorted(sizes) if name.endswith((".bin", ".gguf", ".h5"))][:3],
            hint="give a revision that has them (owner/name@revision), or convert it once with save_pretrained",
        )
    size = sum(sizes[name] for name in wanted)
    with _Watched(repo, size, report):
        try:
            path = hub.snapshot_download(repo, revision=info.sha, allow_patterns=sorted(wanted))
        except Exception as error:
            raise _download_error(error, repo) from error
    return Path(path), info.sha


def _wanted(names: set[str]) -> set[str]:
    """Files at the top that a checkpoint needs; not a second copy of the weights under another name."""
    kept = {
        name
        for name in names
        if "/" not in name and name.endswith((".json", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken"))
    }
    if names.intersection({"model.safetensors", "model.safetensors.index.json"}):
        kept = {name for name in kept if not name.endswith(".safetensors") or _PLAIN.fullmatch(name)}
    return kept


def _cached_snapshot(repo: str, revision: str | None, near: list[str], reason: Exception) -> tuple[Path, str | None]:
    """What the hub's cache holds, where the hub itself is out of reach."""
    import huggingface_hub as hub

    try:
        found = hub.snapshot_download(repo, revision=revision, allow_patterns=["config.json"], local_files_only=True)
        path = Path(found)
    except (OSError, ValueError) as error:
        offline = type(reason).__name__ == "OfflineModeIsEnabled"
        details = ["HF_HUB_OFFLINE is set" if offline else _first_line(reason)]
        if near:
            details.append(f"did you mean {' or '.join(near)}?")
        raise BadInput(
            f"{repo}{'@' + revision if revision else ''} is not on this machine, and the hub is out of reach",
            details=details,
            hint="give a checkpoint directory; `kpatch models` lists the aliases (smollm2 needs no hub)",
        ) from error
    return path, path.name if re.fullmatch(r"[0-9a-f]{40}", path.name) else None


def _hub_error(error: Exception, repo: str, revision: str | None, near: list[str]) -> BadInput | None:
    """What a definite answer of the hub means; None where it gave none."""
    from huggingface_hub import errors as hub

    if isinstance(error, hub.GatedRepoError):
        return BadInput(
            f"{repo} is gated: its owner must let you in",
            hint="ask for access on its page, then `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return BadInput(f"{repo} has no revision {revision!r}", hint=f"give {repo} alone for its main branch")
    if isinstance(error, hub.RepositoryNotFoundError | hub.HFValidationError):
        meant = [f"did you mean {' or '.join(near)}?"] if near else []
        return BadInput(
            f"There is no model {repo}: no such directory, alias or public hub repository",
            details=meant,
            hint="`kpatch models` lists the aliases; a private repository needs `hf auth login` or HF_TOKEN",
        )
    return None


def _download_error(error: Exception, repo: str) -> Exception:
    if is_full(error):
        from huggingface_hub.constants import HF_HUB_CACHE

        failed = write_error(error, Path(HF_HUB_CACHE))
        failed.hint = "free some space, or set HF_HOME to a folder on another disk"
        return failed
    return BadInput(
        f"The download of {repo} did not finish",
        details=[_first_line(error)],
        hint="run the same command again: what has arrived is kept",
    )


class _Watched:
    """Progress of a download as the growth of its folder in the hub's cache, whichever way the bytes come in."""

    def __init__(self, repo: str, size: int, report: Reporter) -> None:
        from huggingface_hub.constants import HF_HUB_CACHE

        self._folder = Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "blobs"
        self._task = report.task(f"Downloading {repo}", size, "B")

    def __enter__(self) -> None:
        self._ended = threading.Event()
        self._advance = self._task.__enter__()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._task.__exit__(None, None, None)

    def _watch(self) -> None:
        seen = 0
        while True:
            ended = self._ended.wait(0.5)
            now = self._size()
            if now > seen:
                self._advance(now - seen)
                seen = now
            if ended:
                return

    def _size(self) -> int:
        total = 0
        for file in self._folder.glob("*"):
            try:
                total += file.stat().st_blocks * 512
            except OSError:
                continue  # renamed while we looked
        return total


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
