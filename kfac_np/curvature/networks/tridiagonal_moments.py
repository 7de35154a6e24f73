"""Moments of two layers together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kfac_np.backend import Array, array_namespace
from kfac_np.curvature.sharing import Sharing
from kfac_np.statistics import AffineStatistics, Scale

__all__ = ["cross_derivative_moment", "cross_input_moment", "rows_each"]


def rows_each(s: AffineStatistics, scale: Scale, sharing: Sharing) -> int:
    """Rows that a sharing rule makes of one example: T or 1.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.curvature import expand, reduce
    >>> s, scale = AffineStatistics(np.ones((2, 3, 4)), np.ones((2, 3, 5))), Scale(2, 2)
    >>> rows_each(s, scale, expand), rows_each(s, scale, reduce)
    (3, 1)
    """
    g = s.g
    shape = (1, s.num_locations, 0)
    empty = array_namespace(g).zeros(shape, dtype=g.dtype, device=g.device)
    return int(sharing(AffineStatistics(empty, empty), scale)[0].shape[0])


def cross_input_moment(
    s: AffineStatistics, following: AffineStatistics, scale: Scale, sharing: Sharing
) -> Array:
    """A_{i,i+1}: the weighted mean over rows of a_i a_{i+1}ᵀ, a chunk of examples at a time.

    Parameters
    ----------
    s, following : AffineStatistics
        Of as many rows.
    scale : Scale
    sharing : callable

    Returns
    -------
    Array, shape (d_in + 1, d_in + 1 of the following)

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.curvature import expand
    >>> s = AffineStatistics(np.asarray([[[1.0]], [[3.0]]]), np.ones((2, 1, 1)))
    >>> cross_input_moment(s, s, Scale(2, 2), expand)
    array([[5.]])
    """
    total: Any = 0.0
    count: Any = 0.0
    first, weights = 0, None
    for x, y in _side_by_side(_rows(s, scale, sharing), _rows(following, scale, sharing)):
        last = first + x.shape[0]
        if scale.weights is not None:
            each = rows_each(s, scale, sharing)
            weights = scale.row_weights(each * scale.examples)
            assert weights is not None
            weights = weights[first:last]
            y = y * weights[:, None]
        total = total + x.T @ y
        count = count + (x.shape[0] if weights is None else array_namespace(x).sum(weights))
        first = last
        del x, y  # before the next ones are unfolded
    return total / count


def cross_derivative_moment(
    s: AffineStatistics, following: AffineStatistics, scale: Scale, sharing: Sharing
) -> Array:
    """G_{i,i+1} = (1/M) times the sum over rows of g_i g_{i+1}ᵀ.

    Parameters
    ----------
    s, following : AffineStatistics
        Of as many rows.
    scale : Scale
    sharing : callable

    Returns
    -------
    Array, shape (d_out, d_out of the following)

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.curvature import expand
    >>> s = AffineStatistics(np.ones((2, 1, 1)), np.asarray([[[1.0]], [[3.0]]]))
    >>> cross_derivative_moment(s, s, Scale(2, 2), expand)
    array([[5.]])
    """
    x = sharing(s.derivatives_only(), scale)[1]
    y = sharing(following.derivatives_only(), scale)[1]
    return x.T @ y / scale.terms


def _rows(s: AffineStatistics, scale: Scale, sharing: Sharing) -> Iterator[Array]:
    def rows(chunk: AffineStatistics) -> Array:
        return sharing(chunk, scale)[0]

    return map(rows, s.inputs_only().chunks())  # unlike a loop, it does not hold on to a chunk


def _side_by_side(left: Iterator[Array], right: Iterator[Array]) -> Iterator[tuple[Array, Array]]:
    """Cut two sequences of chunks of rows so that they match: two layers chunk as suits each."""
    x = y = None
    while True:
        x = next(left, None) if x is None else x
        y = next(right, None) if y is None else y
        if x is None or y is None:
            return
        n = min(x.shape[0], y.shape[0])
        yield x[:n, ...], y[:n, ...]
        x, y = (rows[n:, ...] if rows.shape[0] > n else None for rows in (x, y))
