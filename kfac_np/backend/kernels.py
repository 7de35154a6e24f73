"""Small kernels that everything above is built from."""

from __future__ import annotations

import array_api_compat
import numpy as np

from kfac_np.backend.array import Array, array_namespace

__all__ = ["append_ones", "second_moment", "sum_by_index", "sum_by_index_generic"]


def append_ones(x: Array) -> Array:
    """Append the homogeneous coordinate: [x, 1] along the last axis.

    Parameters
    ----------
    x : Array, shape (..., d)

    Returns
    -------
    Array, shape (..., d + 1)

    Examples
    --------
    >>> import numpy as np
    >>> append_ones(np.asarray([[2.0, 3.0]]))
    array([[2., 3., 1.]])
    """
    xp = array_namespace(x)
    d = x.shape[-1]
    out = xp.empty((*x.shape[:-1], d + 1), dtype=x.dtype, device=x.device)
    out[..., :d] = x
    out[..., d:] = 1.0
    return out


def second_moment(rows: Array, weights: Array | None = None) -> Array:
    """Sum over rows r of w_r r rᵀ (a sum: no division).

    Parameters
    ----------
    rows : Array, shape (R, d)
    weights : Array, shape (R,), optional
        Ones when omitted; then NumPy sends the product to BLAS's symmetric rank-k update.

    Returns
    -------
    Array, shape (d, d)

    Examples
    --------
    >>> import numpy as np
    >>> second_moment(np.asarray([[1.0, 2.0]]))
    array([[1., 2.],
           [2., 4.]])
    """
    if weights is None:
        return rows.T @ rows
    return rows.T @ (rows * weights[:, None])


def sum_by_index_generic(values: Array, indices: Array, size: int) -> Array:
    """`sum_by_index` as products with one-hot matrices, by the standard alone.

    Examples
    --------
    >>> import numpy as np
    >>> sum_by_index_generic(np.asarray([[1.0], [2.0], [4.0]]), np.asarray([1, 0, 1]), 2)
    array([[2.],
           [5.]])
    """
    xp = array_namespace(values)
    total = xp.zeros((size, values.shape[1]), dtype=values.dtype, device=values.device)
    classes = xp.arange(size, dtype=indices.dtype, device=indices.device)
    step = max(1, 2**22 // max(size, 1))  # rows of one-hot numbers alive at once
    for start in range(0, values.shape[0], step):
        rows = slice(start, min(start + step, values.shape[0]))
        hot = xp.astype(indices[None, rows] == classes[:, None], values.dtype)
        total += hot @ values[rows, :]
    return total


def sum_by_index(values: Array, indices: Array, size: int) -> Array:
    """out[i] = sum over rows r with indices[r] = i of values[r].

    Parameters
    ----------
    values : Array, shape (R, d)
    indices : Array of int, shape (R,)
        In 0..size-1.
    size : int

    Returns
    -------
    Array, shape (size, d)

    Examples
    --------
    >>> import numpy as np
    >>> sum_by_index(np.asarray([[1.0], [2.0], [4.0]]), np.asarray([1, 0, 1]), 2)
    array([[2.],
           [5.]])
    """
    xp = array_namespace(values)
    if array_api_compat.is_numpy_namespace(xp):
        out = np.zeros((size, values.shape[1]), dtype=values.dtype)
        np.add.at(out, np.asarray(indices), np.asarray(values))
        return out
    if array_api_compat.is_cupy_namespace(xp):
        import cupy

        out = xp.zeros((size, values.shape[1]), dtype=values.dtype)
        cupy.add.at(out, indices, values)
        return out
    return sum_by_index_generic(values, indices, size)
