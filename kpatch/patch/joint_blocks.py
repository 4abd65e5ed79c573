"""Many plain patches solved together: equations of all N rows, but nothing larger than f × f or one patch's own block.

Where no patch knows another's keys and no row stands apart, the equations' matrix is I + U V^T without its diagonal
blocks, one a patch; U and V are [N, f]. I without the blocks of U V^T is solved patch by patch, and U V^T has rank f
(Woodbury).
"""

from __future__ import annotations

import torch
from torch import Tensor


def solved_without_blocks(u: Tensor, v: Tensor, owner: Tensor, columns: Tensor) -> Tensor:
    """(I + U V^T − the blocks of U V^T whose rows and columns have one owner)^-1 columns, [N, c].

    u, v [N, f], owner [N], columns [N, c], all float64 but the owners.
    """
    f = u.shape[1]
    core = torch.eye(f, dtype=u.dtype)
    given = u.new_zeros(f, columns.shape[1])  # V^T of what the blocks alone give
    alone, through = torch.empty_like(columns), torch.empty_like(u)
    for number in torch.unique(owner).tolist():
        mine = (owner == number).nonzero()[:, 0]
        block = torch.eye(len(mine), dtype=u.dtype) - u[mine] @ v[mine].T
        both = torch.linalg.solve(block, torch.cat([u[mine], columns[mine]], dim=1))
        through[mine], alone[mine] = both[:, :f], both[:, f:]
        core += v[mine].T @ both[:, :f]
        given += v[mine].T @ both[:, f:]
    found: Tensor = alone - through @ torch.linalg.solve(core, given)
    return found
