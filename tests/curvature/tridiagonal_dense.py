"""The block-tridiagonal inverse again, with whole matrices and nothing of the library.

Blocks are named by the layers' numbers in a chain; rows of W one after another, so that G comes
first in a Kronecker product.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numerics import host

from kfac_np import trees
from kfac_np.backend import Rng
from kfac_np.fisher import FisherType
from kfac_np.objective import Evaluation

HostArray = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Factors:
    """All A_ij and G_ij of a network whose layers use their weights at equally many locations."""

    A: list[list[HostArray]]
    G: list[list[HostArray]]

    @property
    def sizes(self) -> list[int]:
        return [len(a[i]) * len(g[i]) for i, (a, g) in enumerate(zip(self.A, self.G, strict=True))]

    @property
    def slices(self) -> list[slice]:
        ends = list(itertools.accumulate(self.sizes, initial=0))
        return [slice(a, b) for a, b in itertools.pairwise(ends)]

    def damped(self, damping: float) -> Factors:
        """Factored Tikhonov damping of the diagonal blocks, π by the trace."""
        A, G = [list(row) for row in self.A], [list(row) for row in self.G]
        for i in range(len(A)):
            a, g = A[i][i], G[i][i]
            pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g)))
            A[i][i] = a + pi * np.sqrt(damping) * np.eye(len(a))
            G[i][i] = g + np.sqrt(damping) / pi * np.eye(len(g))
        return Factors(A, G)

    def f_tilde(self) -> HostArray:
        """Every block a Kronecker product."""
        rows = [
            [np.kron(g, a) for a, g in zip(*pair, strict=True)]
            for pair in zip(self.A, self.G, strict=True)
        ]
        return np.block(rows)

    def inverse(self) -> HostArray:
        """F̂⁻¹ = Ξᵀ Λ Ξ, dense (§4.3)."""
        F, parts = self.f_tilde(), self.slices
        Xi, Lambda = np.eye(len(F)), np.zeros_like(F)
        for s, n in itertools.pairwise(parts):
            psi = F[s, n] @ np.linalg.inv(F[n, n])
            Xi[s, n] = -psi
            Lambda[s, s] = np.linalg.inv(F[s, s] - psi @ F[n, n] @ psi.T)
        last = parts[-1]
        Lambda[last, last] = np.linalg.inv(F[last, last])
        return Xi.T @ Lambda @ Xi


def rows_of(e: Evaluation, fisher: FisherType) -> tuple[list[HostArray], list[HostArray]]:
    """Inputs (N · T, d) of every layer, and derivatives (K, N · T, d) of all vectors."""
    inputs: list[HostArray] = []
    derivatives: list[list[HostArray]] = []
    for statistics in fisher.statistics(e, Rng(0)):
        found = trees.leaves(statistics)
        inputs = [host(s.a).reshape(-1, s.a.shape[-1]) for s in found]
        derivatives.append([host(s.stacked_g).reshape(-1, s.g.shape[-1]) for s in found])
    return inputs, [np.concatenate(g) for g in zip(*derivatives, strict=True)]


def factors_of(e: Evaluation, fisher: FisherType) -> Factors:
    """Moments of every two layers together (weights shared by `expand`)."""
    a, g = rows_of(e, fisher)
    w = np.ones(len(a[0]))
    if e.scale.weights is not None:
        w = np.repeat(host(e.scale.weights), len(a[0]) // e.scale.examples)
    return Factors(
        [[np.einsum("r,ri,rj->ij", w, x, y) / w.sum() for y in a] for x in a],
        [[x.T @ y / e.scale.terms for y in g] for x in g],
    )
