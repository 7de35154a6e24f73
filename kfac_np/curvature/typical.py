"""How large the curvature is: what λ is measured in, and the length of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping

from kfac_np import trees
from kfac_np.backend import Scalar, array_namespace, scalar, select
from kfac_np.curvature.base import Curvature, Moments, Units
from kfac_np.trees import Tree

__all__ = ["curvature_norm", "typical_eigenvalue"]


def typical_eigenvalue(
    curvature: Curvature,
    moments: dict[str, Moments],
    params: Tree,
    units: Mapping[str, Units],
) -> Scalar:
    """Π_i (tr F̂_i / n_i)^(n_i / n), n = Σ_i n_i, over the layers' blocks of n_i parameters.

    The geometric mean of the parameters' mean eigenvalues: a plain mean would be that of the layers
    with the largest F̂. Layers without curvature do not count; it is a thousandth of tr F̂ / n at
    least, and 0 where F̂ is 0. A curvature without blocks gives tr F̂ / n.
    """
    sizes = {path: math.prod(p.shape) for path, p in trees.items(params)}
    blocks = curvature.block_traces(moments, params, units)
    if not blocks:
        sizes = {"all": sum(sizes.values())}
        blocks = {"all": curvature.matrix(curvature.in_units(moments, units), params).trace()}
    traces: dict[str, Scalar] = {}
    counted: dict[str, Scalar] = {}
    for path, block in blocks.items():
        trace = scalar(block)
        trace = select(array_namespace(trace).isfinite(trace), trace, 0.0)
        traces[path] = trace
        counted[path] = select(trace > 0.0, float(sizes[path]), 0.0)
    n = sum(counted.values())
    n = select(n > 0.0, n, 1.0)
    typical = 1.0
    for path, trace in traces.items():
        typical = typical * (trace / sizes[path]) ** (counted[path] / n)
    total = sum(traces.values())
    least = 1e-3 * total / n
    return select(total > 0.0, select(typical > least, typical, least), 0.0)


def curvature_norm(curvature: Curvature, moments: dict[str, Moments], v: Tree) -> Scalar:
    """vᵀ F̂ v, undamped."""
    return scalar(trees.inner(v, curvature.matrix(moments, v).matvec(v)))
