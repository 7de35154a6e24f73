"""Scales of quantities, from their mean squares."""

from __future__ import annotations

from kfac_np.backend import Array, array_namespace

__all__ = ["COMMENSURATE", "commensurate", "own_units", "scales", "usual"]

COMMENSURATE = 10.0
"""How far the largest scale of one quantity is from the median, and the median from 1, at most."""


def scales(squares: Array) -> Array:
    """Mean squares by which something can be divided: where one is 0, the largest of its layer.

    Parameters
    ----------
    squares : Array, shape (..., n)

    Examples
    --------
    >>> import numpy as np
    >>> scales(np.asarray([4.0, 0.0])), scales(np.zeros(2))
    (array([4., 4.]), array([1., 1.]))
    """
    xp = array_namespace(squares)
    info = xp.finfo(squares.dtype)
    known = xp.isfinite(squares) & (squares > float(info.smallest_normal) / float(info.eps))
    largest = xp.max(xp.where(known, squares, xp.zeros_like(squares)), axis=-1, keepdims=True)
    return xp.where(known, squares, xp.where(largest > 0.0, largest, xp.ones_like(largest)))


def commensurate(squares: Array) -> Array:
    """Whether the largest root is at most `COMMENSURATE` times the median; zeros apart.

    Parameters
    ----------
    squares : Array, shape (..., n)

    Examples
    --------
    >>> import numpy as np
    >>> commensurate(np.asarray([[1.0, 0.0, 9.0], [1.0, 1.0, 1e8]]))
    array([ True, False])
    """
    return array_namespace(squares).max(squares, axis=-1) <= COMMENSURATE**2 * _median(squares)


def usual(squares: Array) -> Array:
    """Whether the median root is at most `COMMENSURATE`, so that weights of usual size suit it.

    Parameters
    ----------
    squares : Array, shape (..., n)
        Mean squares of inputs.

    Examples
    --------
    >>> import numpy as np
    >>> usual(np.asarray([[0.01, 1.0], [1e4, 1.0]]))
    array([ True, False])
    """
    return _median(squares) <= COMMENSURATE**2


def _median(squares: Array) -> Array:
    """The upper one of those that are finite and not 0."""
    xp, n = array_namespace(squares), squares.shape[-1]
    known = xp.isfinite(squares) & (squares > 0.0)
    ordered = xp.sort(xp.where(known, squares, xp.zeros_like(squares)), axis=-1)
    # of k that are not zero, the last k of all, the upper one of the middle
    count = xp.sum(xp.astype(known, xp.int64), axis=-1, keepdims=True)
    middle = xp.arange(n, device=squares.device) == n - 1 - (count - 1) // 2
    return xp.sum(xp.where(middle, ordered, xp.zeros_like(ordered)), axis=-1)


def own_units(diagonal: Array) -> Array:
    """1 / √diag F: units that damp by a multiple of diag F, after Marquardt.

    Parameters
    ----------
    diagonal : Array, of a parameter's shape

    References
    ----------
    Marquardt 1963, *An Algorithm for Least-Squares Estimation of Nonlinear Parameters*.

    Examples
    --------
    >>> import numpy as np
    >>> own_units(np.asarray([[4.0, 1.0], [0.0, 0.25]]))
    array([[0.5, 1. ],
           [0.5, 2. ]])
    """
    xp = array_namespace(diagonal)
    return 1.0 / xp.sqrt(xp.reshape(scales(xp.reshape(diagonal, (-1,))), diagonal.shape))
