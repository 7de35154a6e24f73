"""Max pooling, one axis after another.

The largest of a window is the largest of its rows' largest: k + k comparisons instead of k · k,
and most of them of what an axis has shrunk already. The last axis comes first, so that of equal
pixels the first in row-major order wins.
"""

from __future__ import annotations

import math
from typing import Any

import array_api_compat

from kfac_np.backend.array import Array, array_namespace
from kfac_np.backend.geometry import Geometry, window_axes
from kfac_np.backend.numpy_kernels import window_maxima
from kfac_np.backend.torch_kernels import pooling

__all__ = [
    "max_pool",
    "max_pool_generic",
    "max_pool_tangent",
    "max_pool_tangent_generic",
    "max_pool_transpose",
    "max_pool_transpose_generic",
]


def max_pool(x: Array, geometry: Geometry) -> tuple[Array, tuple[Array, ...]]:
    """The largest pixel of each window, and which one it was.

    Parameters
    ----------
    x : Array, shape (N, *spatial, C)
        Not padded yet; padding is lower than every number.
    geometry : Geometry
        Without dilation.

    Returns
    -------
    y : Array, shape (N, *out, C)
    winners : tuple of Array of int
        For each axis, which tap along it won: shape (N, *spatial before it, *out from it on, C).
        One byte each, for windows of up to 256 pixels along the axis. PyTorch's kernels, on one
        or two axes, have pixels of the image instead, in one array.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([[[1.0], [3.0], [2.0], [2.0], [9.0]]])
    >>> y, (winner,) = max_pool(x, Geometry((2,), (2,), (1,), ((0, 0),)))
    >>> y[0, :, 0], winner[0, :, 0]
    (array([3., 2.]), array([1, 0], dtype=uint8))
    """
    if pooling.suits(x, geometry):
        return pooling.largest_of_windows(x, geometry)
    if not _is_numpy(x) or max(geometry.kernel) > 256:
        return max_pool_generic(x, geometry)
    return window_maxima.largest_of_windows(x, geometry)


def max_pool_generic(x: Array, geometry: Geometry) -> tuple[Array, tuple[Array, ...]]:
    """`max_pool` of all examples at once, by the standard alone.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([[[1.0], [3.0], [2.0], [2.0], [9.0]]])
    >>> max_pool_generic(x, Geometry((2,), (2,), (1,), ((0, 0),)))[0][0, :, 0]
    array([3., 2.])
    """
    xp, winners = array_namespace(x), []
    for taps in window_axes(geometry, geometry.output_size(tuple(x.shape[1:-1]))):
        dtype = xp.uint8 if taps.count <= 256 else xp.int32
        x = _part(x, taps.axis, -taps.low, x.shape[taps.axis] + taps.low + taps.high, -math.inf)
        y = x[taps.window(0)]
        winner = xp.zeros(y.shape, dtype=dtype, device=x.device)
        for i in range(1, taps.count):
            pixel = x[taps.window(i)]
            # Products with booleans are several times faster than `where`.
            winner = xp.maximum(winner, xp.astype(pixel > y, dtype) * i)
            y = xp.maximum(y, pixel)
        winners.append(winner)
        x = y
    return x, tuple(reversed(winners))


def max_pool_transpose(
    g: Array, winners: tuple[Array, ...], geometry: Geometry, size: tuple[int, ...]
) -> Array:
    """Carry derivatives to the pixels that won.

    Parameters
    ----------
    g : Array, shape ([K,] N, *out, C)
    winners : tuple of Array
        Of `max_pool`.
    geometry : Geometry
    size : tuple of int
        Spatial size of its input.

    Returns
    -------
    Array, shape ([K,] N, *size, C)

    Examples
    --------
    >>> import numpy as np
    >>> g, winners = np.asarray([[[5.0], [6.0]]]), (np.asarray([[[1], [0]]]),)
    >>> max_pool_transpose(g, winners, Geometry((2,), (2,), (1,), ((0, 0),)), (5,))[0, :, 0]
    array([0., 5., 6., 0., 0.])
    """
    if pooling.suits(g, geometry):
        return pooling.spread_to_winners(g, winners, geometry, size)
    if not _is_numpy(g):
        return max_pool_transpose_generic(g, winners, geometry, size)
    return window_maxima.spread_to_winners(g, winners, geometry, size)


def max_pool_transpose_generic(
    g: Array, winners: tuple[Array, ...], geometry: Geometry, size: tuple[int, ...]
) -> Array:
    """`max_pool_transpose` of all examples at once, by the standard alone.

    Examples
    --------
    >>> import numpy as np
    >>> g, winners = np.asarray([[[5.0], [6.0]]]), (np.asarray([[[1], [0]]]),)
    >>> geometry = Geometry((2,), (2,), (1,), ((0, 0),))
    >>> max_pool_transpose_generic(g, winners, geometry, (5,))[0, :, 0]
    array([0., 5., 6., 0., 0.])
    """
    xp, axes = array_namespace(g), window_axes(geometry, geometry.output_size(size))
    winner: Any
    for taps, winner, n in zip(reversed(axes), winners, size, strict=True):
        shape = list(g.shape)
        shape[taps.axis] = n + taps.low + taps.high
        dx = xp.zeros(tuple(shape), dtype=g.dtype, device=g.device)
        for i in range(taps.count):
            dx[taps.window(i)] += xp.astype(winner == i, g.dtype) * g
        g = _part(dx, taps.axis, taps.low, n, 0.0)
    return g


def max_pool_tangent(dx: Array, winners: tuple[Array, ...], geometry: Geometry) -> Array:
    """What the pixels that won are in dx: the adjoint of `max_pool_transpose`.

    Parameters
    ----------
    dx : Array, shape (N, *spatial, C)
    winners : tuple of Array
        Of `max_pool`.
    geometry : Geometry

    Returns
    -------
    Array, shape (N, *out, C)

    Examples
    --------
    >>> import numpy as np
    >>> dx, winners = np.asarray([[[5.0], [6.0], [7.0]]]), (np.asarray([[[1]]]),)
    >>> max_pool_tangent(dx, winners, Geometry((2,), (2,), (1,), ((0, 0),)))[0, :, 0]
    array([6.])
    """
    if pooling.suits(dx, geometry):
        return pooling.winning_pixels(dx, winners, geometry)
    if _is_numpy(dx):
        return window_maxima.pixels_of_winners(dx, winners, geometry)
    return max_pool_tangent_generic(dx, winners, geometry)


def max_pool_tangent_generic(dx: Array, winners: tuple[Array, ...], geometry: Geometry) -> Array:
    """`max_pool_tangent` of all examples at once, by the standard alone.

    Examples
    --------
    >>> import numpy as np
    >>> dx, winners = np.asarray([[[5.0], [6.0], [7.0]]]), (np.asarray([[[1]]]),)
    >>> max_pool_tangent_generic(dx, winners, Geometry((2,), (2,), (1,), ((0, 0),)))[0, :, 0]
    array([6.])
    """
    xp, axes = (
        array_namespace(dx),
        window_axes(geometry, geometry.output_size(tuple(dx.shape[1:-1]))),
    )
    winner: Any
    for taps, winner in zip(axes, reversed(winners), strict=True):
        padded = dx.shape[taps.axis] + taps.low + taps.high
        dx = _part(dx, taps.axis, -taps.low, padded, 0.0)
        dy = xp.zeros(winner.shape, dtype=dx.dtype, device=dx.device)
        for i in range(taps.count):
            dy += xp.astype(winner == i, dx.dtype) * dx[taps.window(i)]
        dx = dy
    return dx


def _part(x: Array, axis: int, start: int, count: int, value: float) -> Array:
    """`count` pixels along an axis from `start` on, with a value where x has none."""
    n = x.shape[axis]
    if start == 0 and count == n:
        return x
    shape = list(x.shape)
    shape[axis] = count
    part = array_namespace(x).full(tuple(shape), value, dtype=x.dtype, device=x.device)
    first, last = max(start, 0), min(start + count, n)
    rest = (slice(None),) * (-axis - 1)
    part[..., first - start : last - start, *rest] = x[..., first:last, *rest]
    return part


def _is_numpy(x: Array) -> bool:
    return bool(array_api_compat.is_numpy_namespace(array_namespace(x)))
