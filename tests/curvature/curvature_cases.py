"""Every curvature with the sharing rules it stands for, and what can be asked of each.

To have all laws run on a new curvature, add an entry to `CURVATURES`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from cases import NETWORKS, NetworkCase
from numerics import host

from kfac_np import trees
from kfac_np.backend import Rng
from kfac_np.curvature import (
    EKFAC,
    BlockDiagonal,
    BlockTridiagonal,
    Curvature,
    DiagonalBlock,
    ExactBlock,
    FullMatrix,
    KFACBlock,
    LadderEvent,
    no_pi,
    pi_frobenius,
    pi_spectral,
    plain,
    reduce,
)
from kfac_np.curvature.base import Units
from kfac_np.fisher import Empirical, Exact, FisherType, MonteCarlo
from kfac_np.objective import Evaluation
from kfac_np.trees import Tree

HostArray = np.ndarray[Any, Any]


@dataclass(frozen=True)
class CurvatureCase:
    """A curvature.

    Attributes
    ----------
    exact_damping
        Whether `solve` is the inverse of the matrix plus λI itself.
    reduces
        Whether positions are reduced, so that a loss at every position is refused.
    """

    curvature: Curvature
    exact_damping: bool
    reduces: bool = False


CURVATURES: dict[str, CurvatureCase] = {
    "kfac": CurvatureCase(BlockDiagonal(), exact_damping=False),
    "kfac frobenius": CurvatureCase(BlockDiagonal(KFACBlock(rule=pi_frobenius)), False),
    "kfac spectral": CurvatureCase(BlockDiagonal(KFACBlock(rule=pi_spectral)), False),
    "kfac no pi": CurvatureCase(BlockDiagonal(KFACBlock(rule=no_pi)), False),
    "kfac plain": CurvatureCase(BlockDiagonal(KFACBlock(rule=plain)), False),
    "kfac exactly damped": CurvatureCase(BlockDiagonal(KFACBlock(exact_damping=True)), True),
    "kfac reduce": CurvatureCase(BlockDiagonal(KFACBlock(sharing=reduce)), False, reduces=True),
    "diagonal": CurvatureCase(BlockDiagonal(DiagonalBlock()), True),
    "exact blocks": CurvatureCase(BlockDiagonal(ExactBlock()), True),
    "full": CurvatureCase(FullMatrix(), True),
    "ekfac": CurvatureCase(EKFAC(), True),
    "ekfac reduce": CurvatureCase(EKFAC(sharing=reduce), True, reduces=True),
    "tridiagonal": CurvatureCase(BlockTridiagonal(split=True), False),
    "tridiagonal reduce": CurvatureCase(
        BlockTridiagonal(KFACBlock(sharing=reduce), split=True), False, reduces=True
    ),
}

FISHERS: dict[str, FisherType] = {
    "exact": Exact(),
    "empirical": Empirical(),
    "monte carlo": MonteCarlo(2),
}

SHARING = {"expand": BlockDiagonal(), "reduce": BlockDiagonal(KFACBlock(sharing=reduce))}


def supported(case: CurvatureCase, network: NetworkCase) -> bool:
    """Reduced factors are not defined for a loss at every position, coupling, and some more."""
    return network.reducible or not case.reduces


def pairs() -> list[tuple[str, NetworkCase]]:
    """Every curvature with every network that it is defined for."""
    return [(name, n) for name, c in CURVATURES.items() for n in NETWORKS if supported(c, n)]


def estimate(
    curvature: Curvature, e: Evaluation, fisher: FisherType | None = None, seed: int = 0
) -> dict[str, Any]:
    return curvature.estimate(e, fisher or Exact(), Rng(seed))


def dense(curvature: Curvature, e: Evaluation, fisher: FisherType | None = None) -> HostArray:
    """The undamped approximation, written out on the host."""
    return host(curvature.matrix(estimate(curvature, e, fisher), e.params).to_dense())


def solve(curvature: Curvature, e: Evaluation, v: Tree, damping: float) -> Tree:
    """One exact-Fisher solve from beginning to end."""
    factors, _ = curvature.factorise(estimate(curvature, e), damping)
    return curvature.solve(factors, v)


def solve_in_own_units(
    curvature: Curvature, e: Evaluation, v: Tree, damping: float, *, measured: bool = False
) -> tuple[Tree, list[LadderEvent]]:
    """As `solve`, damped where every parameter is a pure number; `measured` there, too."""
    moments = curvature.estimate(e, Exact(), Rng(0), in_own_units=measured)
    units = curvature.units(moments, e.params)
    factors, events = curvature.factorise(curvature.in_units(moments, units), damping)
    return in_units(units, curvature.solve(factors, in_units(units, v))), events


def in_units(units: Mapping[str, Units], v: Tree) -> Tree:
    """u ∘ v, for each parameter that has units."""
    return trees.map_named(lambda path, x: math.prod(units.get(path, ()), start=x), v)


def layer_slices(params: Tree) -> Iterator[tuple[str, slice]]:
    """Where each parameter lies in the ravelled vector."""
    start = 0
    for path, p in trees.items(params):
        stop = start + int(np.prod(p.shape))
        yield path, slice(start, stop)
        start = stop


def diagonal_blocks(matrix: HostArray, params: Tree) -> HostArray:
    """The matrix without what is between the layers."""
    out = np.zeros_like(matrix)
    for _, s in layer_slices(params):
        out[s, s] = matrix[s, s]
    return out
