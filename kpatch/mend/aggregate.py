"""Many facts' updates as one: their sum (MEND), or ridge regression over all of them (MALMEN).

Every token j of every fact has its input u_j [in] and what the editor makes of it, the update −α δ̃_j ũ_jᵀ. Both ways
end in a change of the layer's output for an input x that goes through pairs: (x · reads) writes, with reads [R, in]
and writes [R, out]. Source of the regression: Tan et al. 2024 (MALMEN): v_j = −α (ũ_j · u_j) δ̃_j is what an update
does to its own input, and S = (UᵀU + λ P⁻¹)⁻¹ UᵀV does that to all of them at once, as far as they agree. P is the
identity, as in the paper, or the inverse of C = E[u uᵀ] over inputs that must stay as they are, as in MEMIT.
"""

from __future__ import annotations

import torch
from torch import Tensor


def differences(u: Tensor, pseudo_u: Tensor, step_delta: Tensor) -> Tensor:
    """v_j = (ũ_j · u_j) (−α δ̃_j): [..., R, out] from u, ũ [..., R, in] and −α δ̃ [..., R, out]."""
    return (u * pseudo_u).sum(-1, keepdim=True) * step_delta


def regression(u: Tensor, v: Tensor, ridge: Tensor, precision: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """reads and writes of S = (UᵀU + λ P⁻¹)⁻¹ UᵀV for u [..., R, in], v [..., R, out], λ a scalar, P [in, in] or I.

    Tokens that are all zero (padding) take no part. S = P Uᵀ (U P Uᵀ + λ I)⁻¹ V where R × R is less than in × in.
    """
    tokens, width = u.shape[-2:]
    spread = u if precision is None else u @ precision  # U P [..., R, in]
    if tokens <= width:
        gram = spread @ u.mT + ridge * torch.eye(tokens, dtype=u.dtype, device=u.device)
        return spread, torch.linalg.solve(gram, v)
    gram = spread.mT @ u + ridge * torch.eye(width, dtype=u.dtype, device=u.device)
    reads = torch.eye(width, dtype=u.dtype, device=u.device).expand(*u.shape[:-2], width, width)
    return reads, torch.linalg.solve(gram, spread.mT @ v)
