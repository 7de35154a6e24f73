"""The layer table: what curvature each parameter gets, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kfac_np import trees
from kfac_np.backend import array_namespace
from kfac_np.curvature.analysis.costs import costs
from kfac_np.curvature.base import Curvature
from kfac_np.curvature.networks.block_diagonal import BlockDiagonal
from kfac_np.layers import Layer
from kfac_np.trees import Tree

__all__ = ["aligned", "describe", "statistics_of_zeros"]


def describe(
    network: Layer, params: Tree, curvature: Curvature, input_shape: tuple[int, ...]
) -> str:
    """Tabulate layer, parameters, block, factor sizes and cost, a line for each parameter.

    Parameters
    ----------
    network : Layer
    params : tree of Array
    curvature : Curvature
    input_shape : tuple of int
        Of one example.

    Returns
    -------
    str
        Operations are floating-point multiplications and additions, once a factorisation and
        once a solve. Blocks of your own tell theirs by `Block.cost`, or leave them empty.

    Raises
    ------
    ShapeError
        The network does not accept such inputs.
    CurvatureError
        A block is meant for a parameter that is not there.

    Examples
    --------
    >>> from kfac_np.backend import Rng, get_backend
    >>> from kfac_np.curvature import BlockDiagonal
    >>> from kfac_np.layers import Dense, Sequential, Tanh
    >>> net = Sequential(Dense(4, 3), Tanh(), Dense(3, 2))
    >>> print(describe(net, net.init(Rng(0), get_backend()), BlockDiagonal(), (4,)))
    path  layer        parameters  block      factors         factorise  solve
    0     Dense(4, 3)  3×5 = 15    KFACBlock  A 5×5, G 3×3    304        240
    2     Dense(3, 2)  2×4 = 8     KFACBlock  A 4×4, G 2×2    144        96
    total              23                                     448        336
    """
    network.output_shape(input_shape)
    if isinstance(curvature, BlockDiagonal):
        curvature.require_paths(path for path, _ in trees.items(params))
    found = costs(curvature, network, params, statistics_of_zeros(network, params, input_shape))
    rows = [("path", "layer", "parameters", "block", "factors", "factorise", "solve")]
    totals = [0, 0, 0]
    for path, p in trees.items(params):
        cost = found[path]
        size = f"{'×'.join(map(str, p.shape))} = {math.prod(p.shape)}"
        name = repr(network.at(path))
        operations = (cost.get("factorise"), cost.get("solve"))
        rows.append((path, name, size, cost["block"], cost["factors"], *map(_short, operations)))
        numbers = (math.prod(p.shape), *operations)
        totals = [total + (n or 0) for total, n in zip(totals, numbers, strict=True)]
    rows.append(("total", "", str(totals[0]), "", "", _short(totals[1]), _short(totals[2])))
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of as many cells each as lines, their columns below one another.

    Examples
    --------
    >>> print(aligned([("path", "size"), ("0.long", "3")]))
    path    size
    0.long  3
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def statistics_of_zeros(network: Layer, params: Tree, input_shape: tuple[int, ...]) -> Tree:
    """Statistics of one example of zeros, for their kinds and shapes."""
    like = trees.leaves(params)[0]
    xp = array_namespace(like)
    examples = 2 if network.couples_examples else 1  # one has no variance
    x = xp.zeros((examples, *input_shape), dtype=network.input_dtype(like), device=like.device)
    y, cache = network.forward(params, x)
    return network.backward(params, cache, xp.zeros_like(y), wrt_input=False)[1]


def _short(operations: int | None) -> str:
    if operations is None:
        return ""
    if operations < 10_000:
        return str(operations)
    for unit, size in (("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12)):
        if operations < 1000 * size:
            return f"{operations / size:.3g}{unit}"
    return f"{operations:.3g}"
