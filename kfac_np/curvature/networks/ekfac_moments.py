"""Second moments of the derivatives of each example, in a Kronecker-factored basis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kfac_np.backend import Array, array_namespace, patch_budget, rounding_error, sum_by_index
from kfac_np.statistics import (
    AffineStatistics,
    EmbeddingStatistics,
    GroupedStatistics,
    Scale,
    Statistics,
)

__all__ = ["resolve", "rotated_squares"]


def rotated_squares(s: Statistics, scale: Scale, u_a: Array | None, u_g: Array) -> Array:
    """s_ij = (1/M) Σ_{n,k} [(U_Gᵀ U_nk U_A)_ij]², U_nk the sum over locations of g āᵀ.

    The diagonal of the exact block in the basis U_G ⊗ U_A, whatever the sharing of weights. Where
    examples are coupled, the batch is one example, as for `term_gradients`.

    Parameters
    ----------
    s : Statistics
    scale : Scale
    u_a : Array or None, shape ([groups,] d_in + 1, d_in + 1)
        Orthogonal, as columns; None stands for the identity (embeddings).
    u_g : Array, shape ([groups,] d_out, d_out)

    Returns
    -------
    Array, of the parameter's shape
        A sum over vectors, those of several chunks are added; over M.

    References
    ----------
    George et al. 2018, arXiv:1806.03884, eq. 8 and 9.

    Examples
    --------
    >>> import numpy as np
    >>> s = AffineStatistics(np.asarray([[[1.0, 2.0]]]), np.asarray([[[3.0]]]))
    >>> rotated_squares(s, Scale(terms=1, examples=1), np.eye(2), np.eye(1))
    array([[ 9., 36.]])
    """
    faster = None if scale.coupled else _FASTER.get(type(s))
    if faster is not None:
        return faster(s, u_a, u_g) / scale.terms
    xp, u = array_namespace(u_g), s.gradient() if scale.coupled else s.per_example()
    u = xp.matrix_transpose(u_g) @ u
    u = u if u_a is None else u @ u_a
    return xp.sum(xp.reshape(u * u, (-1, *s.parameter_shape)), axis=0) / scale.terms


def _affine(s: AffineStatistics, u_a: Array, u_g: Array) -> Array:
    total: Any = 0.0
    for chunk in s.chunks():
        total = total + _of_chunk(chunk, u_a, u_g)
        del chunk  # before the next one is unfolded
    return total


def _of_chunk(s: AffineStatistics, u_a: Array, u_g: Array) -> Array:
    xp = array_namespace(s.g)
    g = s.stacked_g @ u_g
    if s.num_locations == 1:
        # the square of an outer product is the product of squares
        return xp.sum(g[:, :, 0, :] ** 2, axis=0).T @ (s.a[:, 0, :] @ u_a) ** 2
    # U_A is applied to what has fewer rows: the inputs at T locations, or K products of d_out rows
    late = s.num_vectors * g.shape[-1] < s.num_locations
    a = s.a if late else s.a @ u_a
    total = xp.zeros(s.parameter_shape, dtype=g.dtype, device=g.device)
    numbers = g.shape[-1] * a.shape[-1] * (xp.finfo(g.dtype).bits // 8)
    step = max(1, patch_budget(g) // numbers)  # examples whose products are alive at once
    for start in range(0, s.num_examples, step):
        rows = slice(start, min(start + step, s.num_examples))
        for k in range(s.num_vectors):
            u = xp.matrix_transpose(g[k, rows, ...]) @ a[rows, ...]
            u = u @ u_a if late else u
            total = total + xp.sum(u * u, axis=0)
    return total


def _grouped(s: GroupedStatistics, u_a: Array, u_g: Array) -> Array:
    each = [_affine(group, u_a[i, ...], u_g[i, ...]) for i, group in enumerate(s.groups)]
    return array_namespace(u_g).stack(each)


def _embedding(s: EmbeddingStatistics, u_a: None, u_g: Array) -> Array:
    """U_A is the identity: the derivatives at equal indices of an example are added, and squared.

    One row for each index that occurs, at the first of its locations: tables may be long.
    """
    xp = array_namespace(s.g)
    g = s.stacked_g @ u_g
    same = xp.astype(s.indices[:, :, None] == s.indices[:, None, :], g.dtype)  # (N, T, T)
    squares = xp.sum((same @ g) ** 2, axis=0)  # (N, T, d_out)
    later = xp.sum(xp.tril(same, k=-1), axis=-1) > 0
    squares = xp.where(later[:, :, None], xp.zeros_like(squares), squares)
    rows = xp.reshape(squares, (-1, squares.shape[-1]))
    return sum_by_index(rows, xp.reshape(s.indices, (-1,)), s.size).T


_FASTER: Mapping[type, Callable[[Any, Any, Array], Array]] = {
    AffineStatistics: _affine,
    GroupedStatistics: _grouped,
    EmbeddingStatistics: _embedding,
}
"""Statistics of which the derivatives of all examples need not be had at once."""


def resolve(squares: Array, absent: Array | None = None) -> Array:
    """Make 0 of what is a rounding error: squares are as small as eps² where amplitudes are eps.

    Parameters
    ----------
    squares : Array, shape (d_out, d_in)
    absent : Array of bool, same shape, optional
        Where the factors that the basis is from have no eigenvalue. A direction without curvature
        is known up to eps over the smallest eigenvalue: there, what is below eps is rounding.

    Examples
    --------
    >>> import numpy as np
    >>> resolve(np.asarray([[1.0, 1e-20, 1e-40]])).tolist()
    [[1.0, 1e-20, 0.0]]
    >>> resolve(np.asarray([[1.0, 1e-20]]), np.asarray([[False, True]])).tolist()
    [[1.0, 0.0]]
    """
    xp = array_namespace(squares)
    error = rounding_error(squares, max(squares.shape))
    lost = squares < float(xp.finfo(squares.dtype).eps) * error  # Inf is not, and stays
    if absent is not None:
        lost = xp.logical_or(lost, xp.logical_and(absent, squares < error))
    return xp.where(lost, xp.zeros_like(squares), squares)
