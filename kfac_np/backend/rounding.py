"""Sums that vanish, told from what rounding leaves of them."""

from __future__ import annotations

from kfac_np.backend.array import Array, array_namespace

__all__ = ["above_rounding", "sums_above_rounding"]

_ROUNDINGS = 1000.0  # of the magnitudes, up to which a sum is taken for a rounding error


def above_rounding(x: Array, largest: Array, magnitude: Array) -> Array:
    """x, and 0 where the sums that it is made from are but rounding errors of what was added up.

    A sum may vanish for a reason: derivatives add up to 0 over the keys of an attention, and over
    the pixels of a channel that is normalised afterwards. Rounding leaves something of it, and its
    square would pass for a curvature, the smallest by far.

    Parameters
    ----------
    x : Array, shape (..., n)
    largest : Array, shape (n,)
        The largest of the sums, without its sign.
    magnitude : Array, shape (n,)
        The largest of the same sums of absolute values.

    Returns
    -------
    Array
        0 where `largest` is less than a thousand roundings of `magnitude`. (Sums that vanish were
        seen to leave up to 40; of T numbers of random sign 1/√T is left.)

    Examples
    --------
    >>> import numpy as np
    >>> above_rounding(np.ones(3), np.asarray([1e-16, 1e-3, 0.0]), np.ones(3))
    array([0., 1., 0.])
    """
    xp = array_namespace(x, largest, magnitude)
    rounding = float(xp.finfo(x.dtype).eps) * magnitude
    return xp.where(largest < _ROUNDINGS * rounding, xp.zeros_like(x), x)


def sums_above_rounding(sums: Array, magnitudes: Array) -> Array:
    """`above_rounding` of sums, a column (all that has one last index) as a whole.

    Parameters
    ----------
    sums : Array, shape (..., n)
    magnitudes : Array, of the same shape
        The same sums of absolute values.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([[0.1, 1.0], [0.2, 1.0], [-0.3, 1.0]])
    >>> float(x.sum(axis=0)[0]) == 0.0, sums_above_rounding(x.sum(axis=0), abs(x).sum(axis=0))
    (False, array([0., 3.]))
    """
    if 0 in sums.shape:
        return sums
    xp, axes = array_namespace(sums, magnitudes), tuple(range(sums.ndim - 1))
    return above_rounding(sums, xp.max(xp.abs(sums), axis=axes), xp.max(magnitudes, axis=axes))
