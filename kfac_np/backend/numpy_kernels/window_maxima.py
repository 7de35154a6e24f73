"""Max pooling of NumPy's arrays, some examples at a time through all axes.

That keeps them in a core's cache. Pixels that are a stride apart are brought together before they
are compared: loops over a few channels would take ten times as long as loops over rows.

`kfac_np.backend.max_pooling` has twins by the standard alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from kfac_np.backend.chunks import cut
from kfac_np.backend.geometry import Geometry, WindowAxis, window_axes
from kfac_np.backend.numpy_kernels import threads

__all__ = ["largest_of_windows", "pixels_of_winners", "spread_to_winners"]

CACHE_BYTES = 3 * 2**19
"""Of inputs that go through all axes together."""


def largest_of_windows(x: Any, geometry: Geometry) -> tuple[Any, tuple[Any, ...]]:
    """`kfac_np.backend.max_pooling.max_pool`, for windows of up to 256 pixels along each axis.

    Examples
    --------
    >>> x = np.asarray([[[1.0], [3.0], [2.0], [2.0], [9.0]]])
    >>> largest_of_windows(x, Geometry((2,), (2,), (1,), ((0, 0),)))[0][0, :, 0]
    array([3., 2.])
    """
    n, *size, c = x.shape
    out = geometry.output_size(tuple(size))
    y = np.empty((n, *out, c), dtype=x.dtype)
    shapes = [(n, *size[:axis], *out[axis:], c) for axis in range(len(out))]
    winners = tuple(np.empty(shape, dtype=np.uint8) for shape in shapes)

    def write(examples: slice) -> None:
        chunk = x[examples, ...]
        for axis, winner in zip(window_axes(geometry, out), reversed(winners), strict=True):
            chunk = _largest(chunk, axis, winner[examples])
        y[examples] = chunk

    threads.each(write, _chunks(n, x))
    return y, winners


def spread_to_winners(
    g: Any, winners: tuple[Any, ...], geometry: Geometry, size: tuple[int, ...]
) -> Any:
    """`kfac_np.backend.max_pooling.max_pool_transpose`.

    Examples
    --------
    >>> g, winners = np.asarray([[[5.0], [6.0]]]), (np.asarray([[[1], [0]]]),)
    >>> spread_to_winners(g, winners, Geometry((2,), (2,), (1,), ((0, 0),)), (5,))[0, :, 0]
    array([0., 5., 6., 0., 0.])
    """
    axes = window_axes(geometry, geometry.output_size(size))
    dx = np.empty((*g.shape[: -len(size) - 1], *size, g.shape[-1]), dtype=g.dtype)
    rest: Any = (slice(None),) * (len(size) + 1)

    def write(examples: slice) -> None:
        chunk = g[..., examples, *rest]
        for axis, winner, n in zip(reversed(axes), winners, size, strict=True):
            chunk = _spread(chunk, axis, winner[examples, ...], n)
        dx[..., examples, *rest] = chunk

    threads.each(write, _chunks(winners[0].shape[0], dx))
    return dx


def pixels_of_winners(dx: Any, winners: tuple[Any, ...], geometry: Geometry) -> Any:
    """`kfac_np.backend.max_pooling.max_pool_tangent`.

    Examples
    --------
    >>> dx, winners = np.asarray([[[5.0], [6.0], [7.0]]]), (np.asarray([[[1]]]),)
    >>> pixels_of_winners(dx, winners, Geometry((2,), (2,), (1,), ((0, 0),)))[0, :, 0]
    array([6.])
    """
    n, *size, c = dx.shape
    out = geometry.output_size(tuple(size))
    dy = np.empty((n, *out, c), dtype=dx.dtype)

    def write(examples: slice) -> None:
        chunk = dx[examples, ...]
        for axis, winner in zip(window_axes(geometry, out), reversed(winners), strict=True):
            chunk = _pick(chunk, axis, winner[examples])
        dy[examples] = chunk

    threads.each(write, _chunks(n, dx))
    return dy


def _largest(x: Any, axis: WindowAxis, winner: Any) -> Any:
    """The largest of each window along one axis; its tap is written to `winner`."""
    winner[...] = 0
    y: Any = None
    larger = np.empty(winner.shape, dtype=bool)
    for i, pixel in enumerate(_pixels(x, axis, -math.inf)):
        if y is None:
            y = pixel if axis.count > 1 else pixel.copy()
            continue
        np.greater(pixel, y, out=larger)
        np.maximum(winner, larger * np.uint8(i), out=winner)
        y = np.maximum(y, pixel, out=None if i == 1 else y)
    return y


def _pick(dx: Any, axis: WindowAxis, winner: Any) -> Any:
    """What the pixels that won along one axis are in dx."""
    dy: Any = None
    for i, pixel in enumerate(_pixels(dx, axis, 0.0)):
        if dy is None:
            dy = pixel * (winner == i)
        else:
            dy += pixel * (winner == i)
    return dy


def _pixels(x: Any, axis: WindowAxis, border: float) -> Iterator[Any]:
    """For each tap along an axis, what it sees in all windows."""
    phases = []
    for _, seen, where, pixels in axis.phases(x.shape[axis.axis]):
        shape = list(x.shape)
        shape[axis.axis] = seen
        phase = np.empty(shape, dtype=x.dtype)
        phase[axis.along(slice(0, where.start))] = border
        phase[axis.along(where)] = x[axis.along(pixels)]
        phase[axis.along(slice(where.stop, seen))] = border
        phases.append(phase)
    for i in range(axis.count):
        later, first = divmod(i, axis.stride)
        yield phases[first][axis.along(slice(later, later + axis.out))]


def _spread(g: Any, axis: WindowAxis, winner: Any, n: int) -> Any:
    """The transpose of `_largest`: derivatives of the n pixels along one axis."""
    shape = list(g.shape)
    shape[axis.axis] = n
    dx = np.zeros(shape, dtype=g.dtype)
    for phase, seen, where, pixels in axis.phases(n):
        shape[axis.axis] = seen
        sums = np.empty(shape, dtype=g.dtype)
        sums[axis.along(slice(axis.out, seen))] = 0.0
        for later, i in enumerate(phase):
            part = sums[axis.along(slice(later, later + axis.out))]
            if later:
                part += g * (winner == i)
            else:
                np.multiply(g, winner == i, out=part)
        dx[axis.along(pixels)] = sums[axis.along(where)]
    return dx


def _chunks(n: int, x: Any) -> Iterator[slice]:
    """Slices of n examples that hold as much of x as stays in the cache."""
    each = math.prod(x.shape) // n * x.itemsize if n else 0
    return cut(n, max(1, CACHE_BYTES // max(1, each)))
