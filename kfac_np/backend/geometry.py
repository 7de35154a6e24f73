"""Where a kernel looks: locations and taps of a convolution, and the border of its input."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, final

import array_api_compat

from kfac_np.backend.array import Array, array_namespace
from kfac_np.backend.numpy_kernels import borders
from kfac_np.errors import ShapeError

__all__ = ["Geometry", "WindowAxis", "pad", "window_axes"]


@final
@dataclass(frozen=True)
class Geometry:
    """Where a kernel looks: one entry for each spatial axis.

    Attributes
    ----------
    kernel, stride, dilation : tuple of int
        Taps, step between locations, step between taps.
    padding : tuple of (int, int)
        Zeros before and after; a negative number cuts off.

    Examples
    --------
    >>> g = Geometry((3, 3), (2, 1), (1, 2), ((1, 1), (0, 0)))
    >>> g.output_size((8, 8)), g.taps
    ((4, 4), 9)
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    @property
    def taps(self) -> int:
        """Pixels of a patch."""
        return math.prod(self.kernel)

    @property
    def extent(self) -> tuple[int, ...]:
        """Pixels that a kernel spans along each axis."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    @property
    def unpadded(self) -> Geometry:
        """The same on an input that is padded already."""
        return replace(self, padding=((0, 0),) * len(self.kernel))

    def padded_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes after padding.

        Raises
        ------
        ShapeError
            Negative padding cuts everything off.
        """
        _require_left(size, self.padding)
        return tuple(n + low + high for n, (low, high) in zip(size, self.padding, strict=True))

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Number of locations along each axis, ⌊(n + padding - extent) / stride⌋ + 1.

        Raises
        ------
        ShapeError
            The kernel does not fit into the padded input.
        """
        return _output_size(self, size)

    def windows(self, out: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
        """For each tap, in row-major order, the slices of the padded input that it looks at."""
        for tap in itertools.product(*map(range, self.kernel)):
            yield tuple(
                slice(i * d, i * d + (n - 1) * s + 1, s)
                for i, d, s, n in zip(tap, self.dilation, self.stride, out, strict=True)
            )


@final
@dataclass(frozen=True)
class WindowAxis:
    """The windows of an undilated geometry along one axis.

    Attributes
    ----------
    axis : int
        Counted from the last one: -2 is the last spatial axis.
    count, stride, low, high, out : int
        Taps, step, padding before and after, number of windows.

    Examples
    --------
    >>> import numpy as np
    >>> (axis,) = window_axes(Geometry((3,), (2,), (1,), ((0, 0),)), (2,))
    >>> np.arange(5)[None, :, None][axis.window(1)].ravel()
    array([1, 3])
    """

    axis: int
    count: int
    stride: int
    low: int
    high: int
    out: int

    def along(self, part: slice) -> tuple[Any, ...]:
        """Index that cuts this axis."""
        return (..., part, *(slice(None),) * (-self.axis - 1))

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


def window_axes(geometry: Geometry, out: tuple[int, ...]) -> list[WindowAxis]:
    """Return the axes of an undilated geometry with so many windows, the last axis first.

    Examples
    --------
    >>> axes = window_axes(Geometry((2, 3), (1, 2), (1, 1), ((0, 0), (1, 1))), (7, 4))
    >>> [(axis.axis, axis.count) for axis in axes]
    [(-2, 3), (-3, 2)]
    """
    each = zip(geometry.kernel, geometry.stride, geometry.padding, out, strict=True)
    found = [
        WindowAxis(axis - len(out) - 1, k, s, low, high, n)
        for axis, (k, s, (low, high), n) in enumerate(each)
    ]
    return found[::-1]


def pad(x: Array, padding: tuple[tuple[int, int], ...], value: float = 0.0) -> Array:
    """Put a border of `value` around the spatial axes of (N, *spatial, C); negative widths cut off.

    Examples
    --------
    >>> import numpy as np
    >>> pad(np.ones((1, 2, 1)), ((1, -1),))[0, :, 0]
    array([0., 1.])
    """
    if not any(low or high for low, high in padding):
        return x
    xp = array_namespace(x)
    size = x.shape[1:-1]
    padded = [n + low + high for n, (low, high) in zip(size, padding, strict=True)]
    _require_left(size, padding)
    shape = (x.shape[0], *padded, x.shape[-1])
    inner = [
        slice(max(low, 0), n - max(high, 0)) for n, (low, high) in zip(padded, padding, strict=True)
    ]
    outer = [
        slice(max(-low, 0), n - max(-high, 0)) for n, (low, high) in zip(size, padding, strict=True)
    ]
    if array_api_compat.is_numpy_namespace(xp):
        return borders.put_on(x, shape, tuple(inner), tuple(outer), value)
    out = xp.full(shape, value, dtype=x.dtype, device=x.device)
    out[:, *inner, :] = x[:, *outer, :]
    return out


@functools.lru_cache(maxsize=1024)
def _output_size(geometry: Geometry, size: tuple[int, ...]) -> tuple[int, ...]:
    padded, extent = geometry.padded_size(size), geometry.extent
    if any(n < e for n, e in zip(padded, extent, strict=True)):
        raise ShapeError(f"expected a padded size of at least {extent}, got {padded}")
    return tuple((n - e) // s + 1 for n, e, s in zip(padded, extent, geometry.stride, strict=True))


def _require_left(size: tuple[int, ...], padding: tuple[tuple[int, int], ...]) -> None:
    cut = (max(-low, 0) + max(-high, 0) for low, high in padding)
    if any(c and c >= n for n, c in zip(size, cut, strict=True)):
        raise ShapeError(f"expected something to be left of {tuple(size)} after padding {padding}")
