"""Sizes and operations of blocks, for the table of layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from kfac_np import trees
from kfac_np.curvature.base import Block, Curvature
from kfac_np.curvature.blocks.by_kind import ByKind
from kfac_np.curvature.blocks.diagonal import DiagonalBlock
from kfac_np.curvature.blocks.exact import ExactBlock
from kfac_np.curvature.blocks.grouped import GroupedBlock
from kfac_np.curvature.blocks.kronecker import KroneckerBlock
from kfac_np.curvature.blocks.scale_shift import UnitBlock
from kfac_np.curvature.blocks.spectral import SpectralBlock
from kfac_np.curvature.factors import INPUTS, DiagonalFactor
from kfac_np.curvature.networks.ekfac import EKFAC
from kfac_np.curvature.networks.full_kronecker import FullKronecker
from kfac_np.curvature.networks.tridiagonal import BlockTridiagonal
from kfac_np.layers import Layer
from kfac_np.statistics import Scale
from kfac_np.trees import Tree

__all__ = ["Cost", "block_cost", "costs"]

Cost = Mapping[str, Any]
"""Of one parameter: "block" (a name), "factors" (text), "factorise" and "solve" (operations)."""


def costs(curvature: Curvature, network: Layer, params: Tree, statistics: Tree) -> dict[str, Cost]:
    """What each parameter gets and what it costs, by path.

    Parameters
    ----------
    curvature : Curvature
    network : Layer
    params : tree of Array
    statistics : tree of Statistics
        Of any batch: only kinds and shapes count.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.curvature import BlockDiagonal
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.statistics import AffineStatistics
    >>> s = AffineStatistics(np.ones((1, 1, 3)), np.ones((1, 1, 2)))
    >>> costs(BlockDiagonal(), Dense(2, 2), np.ones((2, 3)), s)
    {'': {'block': 'KFACBlock', 'factors': 'A 3×3, G 2×2', 'factorise': 70, 'solve': 60}}
    """
    found = dict(trees.items(statistics))
    out: dict[str, Cost] = {}
    for path, p in trees.items(params):
        block = curvature.block_of(path)
        out[path] = {"block": type(block).__name__, **block_cost(block, p.shape, found[path])}
    special = _CURVATURES.get(type(curvature))
    return out if special is None else special(curvature, out, network, params, found)


def block_cost(block: Block, shape: tuple[int, ...], s: Any) -> Cost:
    """What a parameter of `shape` costs, of which `s` are statistics of any batch.

    A block that is not the library's says so itself, by `Block.cost`; of one that does not, what
    its moments are of a batch.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.statistics import AffineStatistics
    >>> s = AffineStatistics(np.ones((1, 1, 3)), np.ones((1, 1, 2)))
    >>> block_cost(DiagonalBlock(), (2, 3), s)
    {'factors': 'diagonal 6', 'factorise': 6, 'solve': 6}
    """
    if isinstance(block, ByKind):
        return block_cost(block.kinds[type(s)], shape, s)
    if type(block) in _COSTS:
        return _COSTS[type(block)](block, shape, s)
    if cost := block.cost(shape, type(s)):
        return cost
    scale = Scale(s.num_examples, s.num_examples)
    moments = {**block.input_moments(s, scale), **block.moments(s, scale)}
    sizes = [f"{name} {'×'.join(map(str, m.shape))}".rstrip() for name, m in moments.items()]
    return {"factors": ", ".join(sizes)}


# An inverse takes 2n³ operations, a symmetric eigendecomposition about 9n³.


def _kronecker(block: KroneckerBlock, shape: tuple[int, ...], s: Any) -> Cost:
    d_out, d_in = shape
    decompose, apply = (9, 4) if block.exact_damping else (2, 2)
    if INPUTS[type(s)] is DiagonalFactor:
        return {
            "factors": f"A diagonal {d_in}, G {d_out}×{d_out}",
            "factorise": decompose * d_out**3 + d_in,
            "solve": apply * d_out**2 * d_in,
        }
    return {
        "factors": f"A {d_in}×{d_in}, G {d_out}×{d_out}",
        "factorise": decompose * (d_out**3 + d_in**3),
        "solve": apply * d_out * d_in * (d_out + d_in),
    }


def _spectral(block: SpectralBlock, shape: tuple[int, ...], s: Any) -> Cost:
    """With a new basis; S, one array for all groups, is told by `_of_ekfac`."""
    return _kronecker(KroneckerBlock(exact_damping=True), shape, s)


def _grouped(block: GroupedBlock, shape: tuple[int, ...], s: Any) -> Cost:
    groups = shape[0]
    one = block_cost(block.block, shape[1:], s.groups[0])
    return {
        "factors": f"{groups} × {one['factors']}",
        "factorise": groups * one["factorise"],
        "solve": groups * one["solve"],
    }


def _unit(block: UnitBlock, shape: tuple[int, ...], s: Any) -> Cost:
    r, c = shape
    return {"factors": f"{c} blocks {r}×{r}", "factorise": 10 * c, "solve": 4 * r * r * c}


def _diagonal(block: DiagonalBlock, shape: tuple[int, ...], s: Any) -> Cost:
    n = math.prod(shape)
    return {"factors": f"diagonal {n}", "factorise": n, "solve": n}


def _exact(block: ExactBlock, shape: tuple[int, ...], s: Any) -> Cost:
    n = math.prod(shape)
    return {"factors": f"block {n}×{n}", "factorise": 2 * n**3, "solve": 2 * n**2}


_COSTS: Mapping[type, Callable[[Any, tuple[int, ...], Any], Cost]] = {
    KroneckerBlock: _kronecker,
    SpectralBlock: _spectral,
    GroupedBlock: _grouped,
    UnitBlock: _unit,
    DiagonalBlock: _diagonal,
    ExactBlock: _exact,
}


# ---------------------------------------------------------------------------------- curvatures

Costs = dict[str, Cost]


def _of_ekfac(
    curvature: EKFAC, alone: Costs, network: Layer, params: Tree, found: Mapping[str, Any]
) -> Costs:
    """Named after what a parameter gets; where that has factors, there is S, too."""
    other = type(curvature.elementwise)
    out: Costs = {}
    for path, p in trees.items(params):
        cost = alone[path]
        if type(curvature.block_of(path).kinds[type(found[path])]) is other:
            out[path] = {**cost, "block": other.__name__}
        else:
            factors = f"{cost['factors']}, S {'×'.join(map(str, p.shape))}"
            out[path] = {**cost, "block": "EKFAC", "factors": factors}
    return out


def _of_tridiagonal(
    curvature: BlockTridiagonal,
    alone: Costs,
    network: Layer,
    params: Tree,
    found: Mapping[str, Any],
) -> Costs:
    """A coupled parameter has factors with the next."""
    shapes = {path: p.shape for path, p in trees.items(params)}
    pairs = curvature.coupled(network, params, found)
    return alone | {
        path: {**alone[path], **_coupled(alone[path], shapes[path], shapes[following])}
        for path, following in pairs
    }


def _coupled(alone: Cost, shape: tuple[int, ...], following: tuple[int, ...]) -> Cost:
    """Cost of a layer coupled to the next, given its cost alone and both parameters' shapes."""
    (g, a), (h, b) = shape, following
    factorise = alone["factorise"]
    for n, m in ((a, b), (g, h)):
        # two Cholesky factors; X, HᵀX, its square, an eigendecomposition, K; Ψ
        factorise += (n**3 + m**3) // 3 + 4 * n * m * m + 4 * n * n * m + 11 * n**3
    ahead_and_back = 2 * g * b * (h + a) + 2 * h * a * (g + b)
    return {
        "factors": f"{alone['factors']}, with next A {a}×{b}, G {g}×{h}",
        "factorise": factorise,
        "solve": 4 * g * a * (g + a) + ahead_and_back,
    }


def _of_full_kronecker(
    curvature: FullKronecker, alone: Costs, network: Layer, params: Tree, found: Mapping[str, Any]
) -> Costs:
    """Of the whole matrix, a parameter's share."""
    sizes = {path: math.prod(p.shape) for path, p in trees.items(params)}
    total = sum(sizes.values())
    return {
        path: {
            "block": "FullKronecker",
            "factors": f"{n} rows of {total}",
            "factorise": 2 * total**2 * n,
            "solve": 2 * total * n,
        }
        for path, n in sizes.items()
    }


_CURVATURES: Mapping[type, Callable[..., Costs]] = {
    EKFAC: _of_ekfac,
    BlockTridiagonal: _of_tridiagonal,
    FullKronecker: _of_full_kronecker,
}
