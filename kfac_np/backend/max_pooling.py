"""Max pooling, one axis after another.

The largest of a window is the largest of its rows' largest: k + k comparisons instead of k · k,
and most of them of what an axis has shrunk already. The last axis comes first, so that of equal
pixels the first in row-major order wins.

On a CPU some examples at a time go through all axes, which keeps them in its cache, and the
pixels that are a stride apart are brought together before they are compared: loops over a few
channels would take ten times as long as loops over rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import array_api_compat
import numpy as np

from kfac_np.backend import threads
from kfac_np.backend.array import Array, array_namespace
from kfac_np.backend.patches import Geometry

__all__ = [
    "max_pool",
    "max_pool_generic",
    "max_pool_tangent",
    "max_pool_transpose",
    "max_pool_transpose_generic",
]

CACHE_BYTES = 3 * 2**19
"""Of inputs that go through all axes together, on a CPU."""


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
        One byte each, for windows of up to 256 pixels along the axis.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([[[1.0], [3.0], [2.0], [2.0], [9.0]]])
    >>> y, (winner,) = max_pool(x, Geometry((2,), (2,), (1,), ((0, 0),)))
    >>> y[0, :, 0], winner[0, :, 0]
    (array([3., 2.]), array([1, 0], dtype=uint8))
    """
    if not _is_numpy(x) or max(geometry.kernel) > 256:
        return max_pool_generic(x, geometry)
    n, *size, c = x.shape
    out = geometry.output_size(tuple(size))
    y: Any = np.empty((n, *out, c), dtype=x.dtype)
    shapes = [(n, *size[:axis], *out[axis:], c) for axis in range(len(out))]
    winners: Any = tuple(np.empty(shape, dtype=np.uint8) for shape in shapes)

    def write(examples: slice) -> None:
        chunk: Any = x[examples, ...]
        for taps, winner in zip(_axes(geometry, out), reversed(winners), strict=True):
            chunk = _largest(chunk, taps, winner[examples])
        y[examples] = chunk

    threads.each(write, _chunks(n, x))
    return y, winners


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
    for taps in _axes(geometry, geometry.output_size(tuple(x.shape[1:-1]))):
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
    if not _is_numpy(g):
        return max_pool_transpose_generic(g, winners, geometry, size)
    axes = _axes(geometry, geometry.output_size(size))
    dx: Any = np.empty((*g.shape[: -len(size) - 1], *size, g.shape[-1]), dtype=g.dtype)
    rest = (slice(None),) * (len(size) + 1)

    def write(examples: slice) -> None:
        chunk: Any = g[..., examples, *rest]
        for taps, winner, n in zip(reversed(axes), winners, size, strict=True):
            chunk = _spread(chunk, taps, winner[examples, ...], n)
        dx[..., examples, *rest] = chunk

    threads.each(write, _chunks(winners[0].shape[0], dx))
    return dx


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
    xp, axes = array_namespace(g), _axes(geometry, geometry.output_size(size))
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
    xp, axes = array_namespace(dx), _axes(geometry, geometry.output_size(tuple(dx.shape[1:-1])))
    winner: Any
    for taps, winner in zip(axes, reversed(winners), strict=True):
        padded = dx.shape[taps.axis] + taps.low + taps.high
        dx = _part(dx, taps.axis, -taps.low, padded, 0.0)
        dy = xp.zeros(winner.shape, dtype=dx.dtype, device=dx.device)
        for i in range(taps.count):
            dy += xp.astype(winner == i, dx.dtype) * dx[taps.window(i)]
        dx = dy
    return dx


@final
@dataclass(frozen=True)
class _Taps:
    """A window along one axis, counted from the last one: -2 is the last spatial axis."""

    axis: int
    count: int
    stride: int
    low: int
    high: int
    out: int

    def along(self, part: slice) -> tuple[Any, ...]:
        """The index that cuts this axis."""
        return _along(self.axis, part)

    def window(self, i: int) -> tuple[Any, ...]:
        """Where tap i looks, in the padded input."""
        return self.along(slice(i, i + (self.out - 1) * self.stride + 1, self.stride))

    def phases(self, n: int) -> Iterator[tuple[range, int, slice, slice]]:
        """What is a stride apart: taps, how many padded pixels they see, and which of n pixels.

        The slices say where among what the taps see, and where in the input, these pixels are.
        """
        for first in range(min(self.count, self.stride)):
            taps = range(first, self.count, self.stride)
            seen = self.out + len(taps) - 1
            begin = max(0, -((first - self.low) // self.stride))
            end = max(begin, min(seen, -((first - self.low - n) // self.stride)))
            pixel = first + begin * self.stride - self.low
            stop = pixel + (end - begin - 1) * self.stride + 1 if end > begin else pixel
            yield taps, seen, slice(begin, end), slice(pixel, stop, self.stride)


def _axes(geometry: Geometry, out: tuple[int, ...]) -> list[_Taps]:
    """The last axis first."""
    each = zip(geometry.kernel, geometry.stride, geometry.padding, out, strict=True)
    found = [
        _Taps(axis - len(out) - 1, k, s, low, high, n)
        for axis, (k, s, (low, high), n) in enumerate(each)
    ]
    return found[::-1]


def _largest(x: Any, taps: _Taps, winner: Any) -> Any:
    """The largest of each window along one axis; its tap is written to `winner`."""
    phases = []
    for _, seen, where, pixels in taps.phases(x.shape[taps.axis]):
        shape = list(x.shape)
        shape[taps.axis] = seen
        phase = np.empty(shape, dtype=x.dtype)
        phase[taps.along(slice(0, where.start))] = -math.inf
        phase[taps.along(where)] = x[taps.along(pixels)]
        phase[taps.along(slice(where.stop, seen))] = -math.inf
        phases.append(phase)
    winner[...] = 0
    y: Any = None
    larger = np.empty(winner.shape, dtype=bool)
    for i in range(taps.count):
        later, first = divmod(i, taps.stride)
        pixel = phases[first][taps.along(slice(later, later + taps.out))]
        if y is None:
            y = pixel if taps.count > 1 else pixel.copy()
            continue
        np.greater(pixel, y, out=larger)
        np.maximum(winner, larger * np.uint8(i), out=winner)
        y = np.maximum(y, pixel, out=None if i == 1 else y)
    return y


def _spread(g: Any, taps: _Taps, winner: Any, n: int) -> Any:
    """The transpose of `_largest`: derivatives of the n pixels along one axis."""
    shape = list(g.shape)
    shape[taps.axis] = n
    dx = np.zeros(shape, dtype=g.dtype)
    for phase, seen, where, pixels in taps.phases(n):
        shape[taps.axis] = seen
        sums = np.empty(shape, dtype=g.dtype)
        sums[taps.along(slice(taps.out, seen))] = 0.0
        for later, i in enumerate(phase):
            part = sums[taps.along(slice(later, later + taps.out))]
            if later:
                part += g * (winner == i)
            else:
                np.multiply(g, winner == i, out=part)
        dx[taps.along(pixels)] = sums[taps.along(where)]
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
    part[_along(axis, slice(first - start, last - start))] = x[_along(axis, slice(first, last))]
    return part


def _along(axis: int, part: slice) -> tuple[Any, ...]:
    return (..., part, *(slice(None),) * (-axis - 1))


def _chunks(n: int, x: Array) -> Iterator[slice]:
    """Slices of n examples that hold as much of x as stays in the cache."""
    each = math.prod(x.shape) // n * array_namespace(x).finfo(x.dtype).bits // 8 if n else 0
    step = max(1, CACHE_BYTES // max(1, each))
    return threads.cut(n, step)


def _is_numpy(x: Array) -> bool:
    return bool(array_api_compat.is_numpy_namespace(array_namespace(x)))
