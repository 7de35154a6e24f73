"""Small kernels that everything above is built from."""

from __future__ import annotations

from kfac_np.backend.array import Array, array_namespace

__all__ = ["append_ones", "second_moment"]


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
