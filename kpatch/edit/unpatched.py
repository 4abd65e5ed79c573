"""The model as it is without the patches that its checkpoint carries.

What a patch must leave alone is what the base does. So statistics for a patch on top of others are those of the base,
the same as those of the patches below it: with one C for all, the sum of a chain is the joint solution of its facts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kpatch import distributed
from kpatch.checkpoint.base_weights import StoredWeights
from kpatch.checkpoint.shards import open_checkpoint
from kpatch.checkpoint.store import Store
from kpatch.edit.weights import restored
from kpatch.errors import BadInput
from kpatch.evaluate.wrapped import name_in
from kpatch.models.fingerprint import weight_files
from kpatch.models.model import Model
from kpatch.patch.format import Patch
from kpatch.reporter import SILENT, Reporter
from kpatch.text import printable


@contextmanager
def unpatched(model: Model, patches: tuple[Patch, ...], report: Reporter = SILENT) -> Iterator[None]:
    """Inside, the model has the weights of its base and goes by their hash, so that the base's cache is found.

    `patches` are those that its checkpoint directory carries; with none nothing happens. Raises Damaged where the
    original bytes of a weight are gone.
    """
    if not patches:
        yield
        return
    assert model.path is not None
    checkpoint = open_checkpoint(model.path)
    store = Store(checkpoint.path)
    weights = StoredWeights(checkpoint, store, store.applied())
    # a patch of the text model has other names than a wrapper around it
    here = {name: name_in(model.net, name) for patch in patches for name in patch.deltas}
    with restored(model, sorted({name for name in here.values() if name is not None})):
        for given, name in sorted(here.items()):
            stored = checkpoint.find(given)
            if stored is None or name is None:
                raise BadInput(f"{checkpoint.given} has no tensor {printable(given, 120)}")
            with torch.no_grad():
                parameter = model.net.get_parameter(name)
                parameter.copy_(weights.tensor(stored).reshape(parameter.shape))
        before = model.weights_id
        model.weights_id = distributed.same("weights", lambda: _fingerprint(weights, report))
        try:
            yield
        finally:
            model.weights_id = before


def base_fingerprint(path: Path, report: Reporter = SILENT) -> str:
    """What `weights_fingerprint` gives for the checkpoint in `path` as it is without its patches."""
    checkpoint = open_checkpoint(path)
    store = Store(checkpoint.path)
    return _fingerprint(StoredWeights(checkpoint, store, store.applied()), report)


def _fingerprint(weights: StoredWeights, report: Reporter) -> str:
    """The hash of the files' bytes before any patch was applied."""
    files = weight_files(weights.checkpoint.path)
    digest = hashlib.sha256()
    with report.task("Identifying the weights", sum(path.stat().st_size for path in files), "B") as advance:
        for path in files:
            digest.update(f"{path.name} {weights.file_hash(path.name, advance)}\n".encode())
    return digest.hexdigest()
