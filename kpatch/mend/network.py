"""The editor network of MEND: per shape of matrix, what turns a token's (u, δ) into a pseudo-(u, δ).

Source: Mitchell et al. 2022 (MEND), eq. 3 and section 3.2; the learned step sizes of section 3.1. The gradient of a
linear layer is Σ_t δ_t u_tᵀ over tokens, so that the network reads and writes vectors instead of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kpatch.mend.places import Place

_TINY = 1e-7
BLOCKS = 2


@dataclass(frozen=True)
class Settings:
    """What an editor is besides its numbers.

    rank  of the two matrices of a block   step  the step size α before training   regression  1 where it was trained
    with MALMEN's ridge regression over all facts, 0 with the sum of their updates   covariance  1 where the ridge is
    the covariance of each place's inputs, 0 where it is the identity
    """

    rank: int
    step: float = 1e-4
    regression: int = 0
    covariance: int = 0


class Block(nn.Module):
    """z + max(0, s_m ⊙ (U V z + b) + o_m): the identity at first, since U, b and o are zero and s is one."""

    def __init__(self, width: int, rank: int, modes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.randn(rank, width, generator=generator))
        self.u = nn.Parameter(torch.zeros(width, rank))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(modes, width))
        self.offset = nn.Parameter(torch.zeros(modes, width))

    def forward(self, z: Tensor, mode: int) -> Tensor:
        inside = (z @ self.v.T) @ self.u.T + self.bias  # (N, D)
        # clamp, unlike relu, passes the gradient at zero, where everything starts
        out: Tensor = z + (self.scale[mode] * inside + self.offset[mode]).clamp(min=0)
        return out


class Transform(nn.Module):
    """The network for one shape (in, out), shared by `modes` places that have a scale and an offset of their own."""

    mean: Tensor
    std: Tensor

    def __init__(self, shape: tuple[int, int], rank: int, modes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = shape
        width = sum(shape)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.blocks = nn.ModuleList(Block(width, min(rank, width), modes, generator) for _ in range(BLOCKS))

    def forward(self, u: Tensor, delta: Tensor, mode: int) -> tuple[Tensor, Tensor]:
        """u [N, in], δ [N, out] of the tokens of one place → ũ, δ̃ of the same shapes, float32 or wider."""
        z = (torch.cat([u, delta], -1).to(self.mean.dtype) - self.mean) / (self.std + _TINY)  # (N, D)
        for block in self.blocks:
            z = block(z, mode)
        return z[..., : self.shape[0]], z[..., self.shape[0] :]


class Precision(nn.Module):
    """P [in, in] of one place: C⁻¹, scaled so that uᵀPu is ‖u‖² on average; the identity before C is measured."""

    matrix: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.eye(width))


class Network(nn.Module):
    """One Transform per shape, and for every place its step size α and the logarithm ℓ of its ridge.

    `sizes` [P] holds the mean ‖u‖² of each place's inputs: the unit of the ridge, e^ℓ · size. `precisions` are the P
    of `kpatch.mend.aggregate.regression`, none where that is the identity.
    """

    sizes: Tensor

    def __init__(self, where: Sequence[Place], settings: Settings, seed: int = 0) -> None:
        super().__init__()
        self.settings = settings
        self.places = tuple(where)
        generator = torch.Generator().manual_seed(seed)
        shapes = sorted({place.shape for place in where})
        shared = {shape: [place for place in where if place.shape == shape] for shape in shapes}
        self._mode = {place.name: shared[place.shape].index(place) for place in where}
        self.transforms = nn.ModuleDict(
            {shape_name(shape): Transform(shape, settings.rank, len(shared[shape]), generator) for shape in shapes}
        )
        self.steps = nn.Parameter(torch.full((len(where),), settings.step))
        self.ridges = nn.Parameter(torch.zeros(len(where)))
        self.register_buffer("sizes", torch.ones(len(where)))
        self.precisions = nn.ModuleList(Precision(place.width_in) for place in where if settings.covariance)

    def forward(self, number: int, u: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """ũ [N, in] and −α δ̃ [N, out] of place `number`: the update of W [out, in] is their product, summed."""
        place = self.places[number]
        pseudo_u, pseudo_delta = self.transforms[shape_name(place.shape)](u, delta, self._mode[place.name])
        return pseudo_u, -self.steps[number] * pseudo_delta

    def ridge(self, number: int) -> Tensor:
        """e^ℓ · mean ‖u‖² of place `number`."""
        return self.ridges[number].exp() * self.sizes[number]

    def precision(self, number: int) -> Tensor | None:
        """P [in, in] of place `number`, None for the identity."""
        if not self.settings.covariance:
            return None
        matrix: Tensor = self.precisions[number].matrix  # type: ignore[assignment]
        return matrix


def shape_name(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"
