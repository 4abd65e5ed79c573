"""What a layer and its residual stream predict at one input, and how the layer makes of the two what leaves it.

At the last token of an input, r is the residual stream without what the MLP adds, y what it adds, o = r + y what
leaves the layer; each predicts its first choice through the model's final norm and head. Source: Geva et al. 2021
(2012.14913), section 5, for gated MLPs too: a memory is active where its coefficient is not small, whatever its sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A coefficient counts as active above this share of the root mean square of all coefficients of its layer and token
ACTIVE = 0.1
KINDS = ("residual", "agreement", "ffn", "composition")


def active_signs(keys: Tensor) -> Tensor:
    """Which of the memories [n, f] are active, and by which sign: 1, −1, or 0, int8."""
    wide = keys.float()
    least = ACTIVE * wide.square().mean(-1, keepdim=True).sqrt()
    return (wide.sign() * (wide.abs() > least)).to(torch.int8)


def effective_share(keys: Tensor) -> Tensor:
    """The participation ratio (Σ m²)² / Σ m⁴ over f, [n]: 1 where all memories take part alike, 1/f where one does."""
    square = keys.double().square()
    ratio = square.sum(-1).square() / square.square().sum(-1).clamp(min=torch.finfo(torch.float64).tiny)
    return (ratio / keys.shape[-1]).float()


def predicted_by_one(signs: Tensor, promoted: Tensor, top: Tensor) -> Tensor:
    """Whether an active memory promotes by itself what the layer predicts: [n] bool.

    signs [n, f]; promoted [2, f], the top tokens of v and of −v; top [n], the layer's.
    """
    by_plus = (promoted[0] == top[:, None]) & (signs > 0)
    by_minus = (promoted[1] == top[:, None]) & (signs < 0)
    return (by_plus | by_minus).any(-1)


def kinds_of(residual: Tensor, layer: Tensor, out: Tensor) -> Tensor:
    """How each prediction came about, from the top tokens of r, y and o [n]: positions in KINDS, [n].

    residual: out keeps r's and y has another; agreement: all are equal; ffn: out takes y's; composition: neither's.
    """
    of_residual, of_layer = out == residual, out == layer
    kinds = torch.full_like(out, KINDS.index("composition"))
    kinds[of_residual & ~of_layer] = KINDS.index("residual")
    kinds[of_residual & of_layer] = KINDS.index("agreement")
    kinds[~of_residual & of_layer] = KINDS.index("ffn")
    return kinds
