"""What a Gaussian over the parameters says of the outputs, linearised: J P⁻¹ Jᵀ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from kfac_np import trees
from kfac_np.applications.laplace_precision import Part, Precision, Prior
from kfac_np.backend import Array, array_namespace, quiet
from kfac_np.layers import Layer
from kfac_np.matrices import (
    DenseSpectral,
    DiagonalMatrix,
    KroneckerSpectral,
    Spectral,
    StackedSpectral,
    UnitSpectral,
)
from kfac_np.statistics import AffineStatistics, GroupedStatistics, Statistics
from kfac_np.trees import Tree

__all__ = ["joint_covariance", "output_moments"]


@quiet
def output_moments(
    network: Layer, params: Tree, precision: Precision, x: Array, diagonal: bool, budget: int
) -> tuple[Array, Array]:
    """Outputs f(x), and J P⁻¹ Jᵀ of each term or its diagonal, some examples at a time.

    Parameters
    ----------
    network : Layer
        Whose examples do not influence each other.
    params : tree of Array
    precision : Precision
    x : Array, shape (N, ...)
    diagonal : bool
    budget : int
        Bytes for what is held at a time (one example at least).

    Returns
    -------
    outputs : Array, shape (N, [S,] C)
    covariance : Array, shape (N, [S,] C, C)
        Or variances, (N, [S,] C).
    """
    sigmas = precision.covariances()
    found = []
    for rows in _chunks(network, params, sigmas, x, budget):
        z, cache = network.forward(params, x[rows, ...])
        xp = array_namespace(z)
        each = []
        for units in _unit_vectors(z):
            statistics = dict(
                trees.items(network.backward(params, cache, units, wrt_input=False)[1])
            )
            parts = [_of_part(part, s, d, statistics, diagonal) for part, s, d in sigmas]
            each.append(sum(parts[1:], start=parts[0]))
        covariance = each[0] if z.ndim == 2 else xp.stack(each, axis=1)
        found.append((z, xp.astype(covariance, z.dtype)))
    xp = array_namespace(x)
    outputs, covariances = zip(*found, strict=True)
    return xp.concat(outputs), xp.concat(covariances)


@quiet
def joint_covariance(network: Layer, params: Tree, precision: Precision, x: Array) -> Array:
    """J P⁻¹ Jᵀ of all outputs of all examples together, shape (N·[S·]C, N·[S·]C)."""
    z, cache = network.forward(params, x)
    xp = array_namespace(z)
    statistics = [
        dict(trees.items(network.backward(params, cache, units, wrt_input=False)[1]))
        for units in _unit_vectors(z)
    ]
    total: Any = 0.0
    for part, sigma, d in precision.covariances():
        rows = xp.stack([_rows(sigma, _gradients(part, d, s)) for s in statistics])  # (S, C, N, n)
        rows = xp.reshape(xp.permute_dims(rows, (2, 0, 1, 3)), (math.prod(z.shape), -1))
        total = total + rows @ rows.T
    joint: Array = xp.astype(total, z.dtype)
    return joint


def _unit_vectors(z: Array) -> Iterator[Array]:
    """For each position the C vectors of outputs there, shape (C, N, [S,] C)."""
    xp, c = array_namespace(z), z.shape[-1]
    eye = xp.eye(c, dtype=z.dtype, device=z.device)
    if z.ndim == 2:
        yield xp.zeros((c, *z.shape), dtype=z.dtype, device=z.device) + eye[:, None, :]
        return
    flat = (z.shape[0], math.prod(z.shape[1:-1]), c)
    for s in range(flat[1]):
        v = xp.zeros((c, *flat), dtype=z.dtype, device=z.device)
        v[:, :, s, :] += eye[:, None, :]
        yield xp.reshape(v, (c, *z.shape))


def _chunks(
    network: Layer,
    params: Tree,
    sigmas: list[tuple[Part, Spectral, Prior]],
    x: Array,
    budget: int,
) -> Iterator[slice]:
    """Rows of x of which everything that is held at a time is within the budget."""
    z, cache = network.forward(params, x[:1, ...])
    units = next(_unit_vectors(z))
    found = dict(trees.items(network.backward(params, cache, units, wrt_input=False)[1]))
    numbers = network.backward_size(x.shape[1:])
    for part, sigma, _ in sigmas:
        if part.joint or not _is_factored(sigma, found[next(iter(part.like))]):
            numbers = max(numbers, 2 * math.prod(sigma.operand_shape))
    item = array_namespace(z).finfo(z.dtype).bits // 8
    at_once = max(1, budget // (max(1, units.shape[0] * numbers) * item))
    for start in range(0, x.shape[0], at_once):
        yield slice(start, min(start + at_once, x.shape[0]))


def _of_part(
    part: Part, sigma: Spectral, units: Prior, statistics: dict[str, Statistics], diagonal: bool
) -> Array:
    """J diag(d) Σ diag(d) Jᵀ, shape (N, C, C) or (N, C)."""
    if not part.joint and isinstance(units, float):  # then d is 1
        return _covariance(sigma, statistics[next(iter(part.like))], diagonal)
    return _gram(_rows(sigma, _gradients(part, units, statistics)), diagonal)


def _covariance(sigma: Spectral, s: Statistics, diagonal: bool) -> Array:
    if isinstance(sigma, StackedSpectral) and isinstance(s, GroupedStatistics):
        parts = [
            _covariance(each, group, diagonal)
            for each, group in zip(sigma.parts, s.groups, strict=True)
        ]
        return sum(parts[1:], start=parts[0])
    if isinstance(s, AffineStatistics) and isinstance(sigma, KroneckerSpectral):
        parts = [_kronecker(sigma, chunk, diagonal) for chunk in s.chunks()]
        return parts[0] if len(parts) == 1 else array_namespace(s.g).concat(parts)
    return _gram(_rows(sigma, s.per_example()), diagonal)


def _is_factored(sigma: Spectral, s: Statistics) -> bool:
    """Whether the derivative of an example is never formed: g āᵀ is enough."""
    if isinstance(sigma, StackedSpectral) and isinstance(s, GroupedStatistics):
        return all(_is_factored(*pair) for pair in zip(sigma.parts, s.groups, strict=True))
    kronecker = isinstance(sigma, KroneckerSpectral)
    return kronecker and isinstance(s, AffineStatistics) and s.num_locations == 1


def _kronecker(sigma: KroneckerSpectral, s: AffineStatistics, diagonal: bool) -> Array:
    """Of derivatives Σ_t g_t ā_tᵀ, which in the eigenbasis are Σ_t g̃_t ã_tᵀ.

    With one location the sum Σ_ij g̃_ci g̃_c'i ã_j² σ_ij needs no matrix for an example.
    """
    xp = array_namespace(s.g)
    values, u_g = (xp.astype(m, s.g.dtype) for m in (sigma.values, sigma.U_G))
    g, a = s.stacked_g @ u_g, s.a
    if sigma.U_A is not None:
        a = a @ xp.astype(sigma.U_A, a.dtype)
    if s.num_locations > 1:
        rows = (xp.matrix_transpose(g) @ a) * xp.sqrt(values)
        return _gram(xp.reshape(rows, (*rows.shape[:2], -1)), diagonal)
    weights = a[:, 0, :] ** 2 @ values.T  # (N, d_out)
    return _gram(g[:, :, 0, :] * xp.sqrt(weights), diagonal)


def _gradients(part: Part, units: Prior, statistics: dict[str, Statistics]) -> Array:
    """diag(d) u of every example and output, shape (C, N, *operand of the part's matrix)."""
    first = statistics[next(iter(part.like))].per_example()
    xp, dtype = array_namespace(first), part.matrix.values.dtype
    if not part.joint:
        return units * xp.astype(first, dtype)
    each = [statistics[path].per_example() for path in part.like]
    flat = [xp.reshape(xp.astype(u, dtype), (*u.shape[:2], -1)) for u in each]
    return units * xp.concat(flat, axis=-1)


def _rows(sigma: Spectral, u: Array) -> Array:
    """Rows r with r rᵀ = u Σ uᵀ: u in the eigenbasis, times root eigenvalues; (C, N, n)."""
    xp = array_namespace(u)
    u = xp.astype(u, sigma.values.dtype)
    shape = (*u.shape[:2], math.prod(sigma.operand_shape))
    root = xp.sqrt(sigma.values)
    if isinstance(sigma, DiagonalMatrix):
        return xp.reshape(u * root, shape)
    if isinstance(sigma, DenseSpectral):
        return (xp.reshape(u, shape) @ sigma.vectors) * root
    if isinstance(sigma, KroneckerSpectral):
        u = sigma.U_G.T @ u
        return xp.reshape((u if sigma.U_A is None else u @ sigma.U_A) * root, shape)
    if isinstance(sigma, StackedSpectral):
        each = [_rows(part, u[:, :, i, ...]) for i, part in enumerate(sigma.parts)]
        return xp.concat(each, axis=-1)
    if isinstance(sigma, UnitSpectral):
        u = xp.matrix_transpose(sigma.U) @ xp.permute_dims(u, (0, 1, 3, 2))[..., None]
        return xp.reshape(u[..., 0] * root.T, shape)
    half = sigma.with_values(root)
    flat = xp.reshape(u, (-1, *sigma.operand_shape))
    return xp.reshape(xp.stack([half.matvec(flat[i, ...]) for i in range(flat.shape[0])]), shape)


def _gram(rows: Array, diagonal: bool) -> Array:
    """Σ over the last axis of products of rows (C, N, n): (N, C, C), or squares: (N, C)."""
    xp = array_namespace(rows)
    if diagonal:
        return xp.vecdot(rows, rows).T
    rows = xp.permute_dims(rows, (1, 0, 2))
    return rows @ xp.matrix_transpose(rows)
