"""Noise on a subject's embeddings: how strong, and which.

Source: Meng et al. 2022 (ROME), section 2.1 and appendix B: Gaussian, three standard deviations of embeddings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from kpatch.errors import CheckFailed
from kpatch.models.model import Model
from kpatch.trace.cells import Traced


@torch.no_grad()
def spread_of_embeddings(model: Model, items: Sequence[Traced]) -> float:
    """σ: the standard deviation of all numbers in the embeddings of all subjects' tokens, where noise is added.

    Raises CheckFailed where that is not a positive number.
    """
    ids = [token for item in items for token in item.ids[item.first : item.last + 1]]
    found = model.net.get_input_embeddings()(torch.tensor(ids, device=model.device)).cpu().double()  # (·, e)
    sigma = float(found.std())
    if not 0 < sigma < float("inf"):
        raise CheckFailed(
            f"The embeddings of {model.name} have no spread to measure noise by", details=[f"σ = {sigma}"]
        )
    return sigma


def draw(model: Model, item: Traced, level: float, samples: int, seed: int) -> Tensor:
    """Gaussian noise [samples, subject tokens, e] float32 of standard deviation `level`.

    It depends on the seed and the prompt's tokens alone: not on the device, nor on which facts are traced beside it.
    """
    content = json.dumps([seed, item.ids, item.first, item.last]).encode()
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(content).digest()[:7], "big"))
    width = model.net.get_input_embeddings().weight.shape[1]
    return level * torch.randn(samples, item.last - item.first + 1, width, generator=generator)
