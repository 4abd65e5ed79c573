"""Patches of one weight, solved together: Δ as if all their facts had been in one patch, from what the patches store.

Patch a asks for residuals R_a [d, n] at keys M_a [f, n] and was solved alone: Δ_a = R_a B_a^T, B_a = (C + P_a)^-1 M_a
with P_a = M_a M_a^T (Meng et al. 2023, eq. 14). The file holds R_a (`W.left`), B_a^T (`W.right`) and M_a. With the
same C for all, the joint solution has the same directions and other amounts, Δ = Σ X_a B_a^T, where

    X_a + Σ_b X_b B_b^T M_a = R_a    over the patches b other than a

which says: each patch gives at its keys what it was asked for, less what the others give there. C is not needed.

A patch made on top of others has their keys in its C and asks only for what they left open. Its equations do not look
back at it from theirs, and it asks for R_a and what those others, together, gave at its keys when it was made. A chain
is therefore its plain sum. Rows of two patches about one subject share a key, and one key cannot be asked for two
residuals: they are added, unless they are the same fact.

The equations have a row for every row of every patch. Where there are more than f and the patches are plain, they are
solved by `solved_without_blocks`; chains, replaced rows and shared subjects take the whole N × N matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from kpatch.patch.delta import one_thread

# Rows of a patch that were replaced: patch id → positions of its rows, by the id of the patch that replaces them.
Replaced = Mapping[str, Mapping[str, frozenset[int]]]


@dataclass(frozen=True)
class RowLabel:
    """What a row is about: its subject, the facts it carries, whether the subject opens its text, and other names."""

    subject: str
    facts: frozenset[tuple[str, str]] = frozenset()
    first: bool = False
    names: frozenset[str] = frozenset()

    @property
    def about(self) -> frozenset[str]:
        """All names of the subject; none for a row that no fact of the patch belongs to."""
        return self.names | {self.subject} if self.subject else self.names


@dataclass(frozen=True, eq=False)
class Asked:
    """What one patch asks of a weight: left = R [d, n], right = B^T [n, f], keys M^T [n, f], and a label for each row.

    `holds` are the ids of the patches it is made of (its own, or those of a stack), `parents` those it was made on.
    """

    id: str
    left: Tensor
    right: Tensor
    keys: Tensor
    rows: tuple[RowLabel, ...]
    parents: frozenset[str] = frozenset()
    holds: frozenset[str] = field(default_factory=frozenset)


class Joint:
    """The joint solution of some patches of one weight, in float64 on the CPU.

    `patches` stand in any order; the result does not depend on it. `replaced` are rows that are out of the solution.
    Raises ValueError where a patch's parts do not fit each other.
    """

    def __init__(self, patches: Sequence[Asked], replaced: Replaced | None = None) -> None:
        self.patches = sorted(patches, key=lambda one: one.id)
        for one in self.patches:
            n = len(one.rows)
            if one.left.shape[1] != n or one.right.shape[0] != n or one.keys.shape != one.right.shape:
                raise ValueError(f"patch {one.id[:12]}: factors, keys and rows do not fit each other")
        self.replaced = replaced or {}
        self.left = torch.cat([one.left.double() for one in self.patches], dim=1)  # (d, N)
        self.right = torch.cat([one.right.double() for one in self.patches])  # (N, f)
        counts = torch.tensor([len(one.rows) for one in self.patches])
        self.owner = torch.repeat_interleave(torch.arange(len(counts)), counts)  # (N,)
        # known[a, b]: the keys of a are in b's own solution
        known = [[a is b or bool(a.holds & b.parents) for b in self.patches] for a in self.patches]
        self.known = torch.tensor(known, dtype=torch.bool)
        self.keys = torch.cat([one.keys.double() for one in self.patches])  # (N, f)
        self.labels = [label for one in self.patches for label in one.rows]
        self.first = torch.tensor([label.first for label in self.labels], dtype=torch.bool)
        self._solved: dict[tuple[tuple[int, ...], frozenset[str]], Tensor] = {}

    @cached_property
    def given(self) -> Tensor:
        """What a unit of column j gives at the key of row i, [N, N]."""
        with one_thread():
            return self.keys @ self.right.T

    @cached_property
    def own(self) -> Tensor:
        """`given` of rows that a patch knows, [N, N]. Only rows that are replaced ask for it."""
        return self.given.masked_fill(~self._inside | self._apart | self._told_again(), 0)

    @cached_property
    def met(self) -> Tensor:
        """`given` of rows that are solved together, [N, N]."""
        return self.given.masked_fill(self._inside | self._apart, 0)

    @property
    def _inside(self) -> Tensor:
        return self.known[self.owner][:, self.owner]

    @cached_property
    def _apart(self) -> Tensor:
        """Pairs of rows [N, N] that are added and not solved together."""
        result = self.first[:, None] != self.first[None]
        for i, j in self._one_subject():
            result[i, j] = True
        return result

    def _one_subject(self) -> Iterator[tuple[int, int]]:
        """Pairs of rows about one subject that are not the same fact, of patches of which neither knows the other."""
        owner, by_name = self.owner.tolist(), dict[str, list[int]]()
        related = (self.known | self.known.T).tolist()
        for index, label in enumerate(self.labels):
            for name in label.about:
                by_name.setdefault(name, []).append(index)
        for members in by_name.values():
            for i in members:
                for j in members:
                    if not related[owner[i]][owner[j]] and self.labels[i].facts != self.labels[j].facts:
                        yield i, j

    @cached_property
    def _plain(self) -> bool:
        """Whether the equations are worth solving without their matrix, and can be."""
        few = len(self.owner) <= self.right.shape[1] or len(self.patches) == 1
        if few or self.replaced or int(self.known.sum()) > len(self.patches):
            return False
        return all(self.labels[i].first != self.labels[j].first for i, j in self._one_subject())

    def _by_blocks(self, u: Tensor, v: Tensor, columns: Tensor) -> Tensor:
        """(I + U V^T where rows are solved together)^-1 columns, [N, c]; rows that open a text, and others, apart."""
        found = columns.clone()
        for some in (self.first, ~self.first):
            if bool(some.any()):
                found[some] = solved_without_blocks(u[some], v[some], self.owner[some], columns[some])
        return found

    def _told_again(self) -> Tensor:
        """Pairs (i, j) [N, N] where the patch of j was made on that of i and has a row about the subject of i.

        Then the key of i is no part of C there.
        """
        names = [frozenset[str]().union(*(label.about for label in one.rows)) for one in self.patches]
        told = torch.tensor(
            [[bool(label.about & theirs) for theirs in names] for label in self.labels], dtype=torch.bool
        )
        return told[:, self.owner] & (self.owner[:, None] != self.owner[None])

    def amounts(self) -> list[Tensor]:
        """X_a [d, n] of every patch, in the order of their ids."""
        with one_thread():
            if self._plain:
                solved = self._by_blocks(self.keys, self.right, self.left.T).T
            else:
                solved = self._amounts(tuple(range(len(self.patches))), frozenset(self.replaced))
        return list(torch.split(solved, [len(one.rows) for one in self.patches], dim=1))

    def as_one(self) -> tuple[Tensor, Tensor]:
        """What one patch of all rows would store: R [d, N] and B^T [N, f], rows in the order of the patches' ids."""
        everything = tuple(range(len(self.patches)))
        with one_thread():
            if self._plain:
                return self.left, self._by_blocks(self.right, self.keys, self.right)
            asked = self._asked(everything)
            right = torch.linalg.solve(self._matrix(everything, frozenset()).T, self.right)
        return asked, right

    def _rows(self, chosen: Sequence[int]) -> Tensor:
        return torch.isin(self.owner, torch.tensor(chosen, dtype=torch.long)).nonzero()[:, 0]

    def _gone(self, chosen: Sequence[int], by: frozenset[str]) -> Tensor:
        """Whether each row of the chosen patches is replaced by one of `by`."""
        flags = []
        for number in chosen:
            one = self.patches[number]
            rows = {row for other in by for row in self.replaced[other].get(one.id, ())}
            flags += [index in rows for index in range(len(one.rows))]
        return torch.tensor(flags, dtype=torch.bool)

    def _amounts(self, chosen: tuple[int, ...], by: frozenset[str]) -> Tensor:
        """X of the chosen patches alone, [d, rows], with the rows gone that the patches `by` replace."""
        key = (chosen, by)
        if key not in self._solved:
            rows, gone = self._rows(chosen), self._gone(chosen, by)
            if not bool(gone.any()) and self._is_chain(chosen):
                self._solved[key] = self.left[:, rows]
            else:
                asked = self._asked(chosen).masked_fill(gone, 0)
                self._solved[key] = torch.linalg.solve(self._matrix(chosen, by), asked.T).T
        return self._solved[key]

    def _is_chain(self, chosen: Sequence[int]) -> bool:
        inside = self.known[list(chosen)][:, list(chosen)]
        return bool((inside | inside.T).all())

    def _matrix(self, chosen: tuple[int, ...], by: frozenset[str]) -> Tensor:
        """The equations' matrix [rows, rows]. A row that is gone is taken out of every solution that had its key."""
        rows, gone = self._rows(chosen), self._gone(chosen, by)
        whole = len(rows) == len(self.owner)
        met = self.met.clone() if whole else self.met[rows][:, rows]
        if bool(gone.any()):
            met = torch.where(gone[:, None], -self.own[rows][:, rows], met)
        met.diagonal().add_(1)
        return met

    def _asked(self, chosen: tuple[int, ...]) -> Tensor:
        """What the chosen patches ask for [d, rows], as if they stood on the unpatched weight."""
        parts = []
        for number in chosen:
            mine = self._rows((number,))
            asked = self.left[:, mine]
            below = tuple(int(other) for other in self.known[:, number].nonzero()[:, 0] if int(other) != number)
            if below:
                one = self.patches[number]
                amounts = self._amounts(below, frozenset(self.replaced) & one.parents)
                asked = asked + amounts @ self.met[mine][:, self._rows(below)].T
            parts.append(asked)
        return torch.cat(parts, dim=1)


def solved_without_blocks(u: Tensor, v: Tensor, owner: Tensor, columns: Tensor) -> Tensor:
    """(I + U V^T − the blocks of U V^T whose rows and columns have one owner)^-1 columns, [N, c].

    u, v [N, f], owner [N], columns [N, c], all float64 but the owners. I without the blocks is solved patch by patch,
    and U V^T has rank f (Woodbury): nothing larger than f × f or one patch's own block is solved.
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
