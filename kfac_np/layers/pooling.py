"""Pooling over windows, over bins, and over all locations.

Arrays are (N, *spatial, C), channels last; every channel is pooled on its own.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, final

from kfac_np.backend import Array, Backend, Geometry, Rng, array_namespace, pad
from kfac_np.backend.max_pooling import max_pool, max_pool_tangent, max_pool_transpose
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers.base import Layer, Parameterless
from kfac_np.layers.spatial import (
    Padding,
    check_axes,
    check_padding,
    padding_pairs,
    per_axis,
    require_channels,
)
from kfac_np.trees import Tree
from kfac_np.validation import is_integer, plain_fields

__all__ = ["AdaptiveAveragePool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"]


class MeanPool(Parameterless):
    """A pool that is linear in x; the cache is the shape of one example."""

    @abstractmethod
    def _linear_transpose(self, shape: tuple[int, ...], g: Array) -> Array:
        """Jᵀ g, for g without a K axis."""

    def forward(self, params: Tree, x: Array, rng: Rng | None = None) -> tuple[Array, Tree]:
        self.output_shape(x.shape[1:])
        return self._tangent(x.shape[1:], x), x.shape[1:]

    def take(self, cache: Tree, rows: slice) -> Tree:
        return cache

    def _transpose(self, cache: Tree, g: Array) -> Array:
        xp, shape = array_namespace(g), tuple(cache)
        out = self.output_shape(shape)
        lead = g.shape[: g.ndim - len(out)]  # ([K,] N)
        dx = self._linear_transpose(shape, xp.reshape(g, (math.prod(lead), *out)))
        return xp.reshape(dx, (*lead, *shape))


@final
@dataclass(frozen=True, repr=False)
class MaxPool(Parameterless):
    """y = max over a window of x; the derivative goes to the largest pixel, the first of equals.

    Sizes are rounded down: an axis of n has ⌊(n + padding - window) / stride⌋ + 1 windows, and
    pixels that no window reaches have no influence. "First" is row-major within the window.

    Parameters
    ----------
    window : int or tuple of int
        One entry for each spatial axis, or one number for all of them.
    stride : int or tuple of int, optional
        The window itself when omitted: windows side by side.
    padding : int, tuple of int, or tuple of pairs
        On both sides, of less than a window: what is put there is lower than every number, so that
        it is never the largest.

    Examples
    --------
    >>> import numpy as np
    >>> pool = MaxPool((2,))
    >>> y, cache = pool.forward((), np.asarray([[[1.0], [3.0], [2.0], [2.0], [9.0]]]))
    >>> y[0, :, 0]
    array([3., 2.])
    >>> pool.backward((), cache, np.ones((1, 2, 1)))[0][0, :, 0]
    array([0., 1., 1., 0., 0.])
    """

    window: int | tuple[int, ...]
    stride: int | tuple[int, ...] | None = None
    padding: Padding = 0

    def __post_init__(self) -> None:
        _check_windows(self)
        window = self.window if isinstance(self.window, tuple) else (self.window,)
        pairs = padding_pairs(self.padding, len(window))
        if any(max(p) >= k for p, k in zip(pairs, window, strict=True)):
            raise InputError(
                f"MaxPool: expected padding of less than the window {self.window}, got "
                f"{self.padding!r}: a window that sees padding only has no largest pixel"
            )

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return _windowed_shape(self, shape)

    def forward(self, params: Tree, x: Array, rng: Rng | None = None) -> tuple[Array, Tree]:
        self.output_shape(x.shape[1:])
        y, winners = max_pool(x, _geometry(self, x.shape[1:]))
        return y, (winners, x.shape[1:])

    def take(self, cache: Tree, rows: slice) -> Tree:
        winners, shape = cache
        return tuple(winner[rows, ...] for winner in winners), shape

    def _tangent(self, cache: Tree, dx: Array) -> Array:
        winners, shape = cache
        return max_pool_tangent(dx, winners, _geometry(self, shape))

    def _transpose(self, cache: Tree, g: Array) -> Array:
        winners, shape = cache
        return max_pool_transpose(g, winners, _geometry(self, shape), tuple(shape[:-1]))


@final
@dataclass(frozen=True, repr=False)
class AveragePool(MeanPool):
    """y = mean over a window of x; the zeros of the padding count as pixels.

    The divisor is the size of the window everywhere. Sizes are rounded down, as by `MaxPool`.

    Parameters
    ----------
    window, stride
        As for `MaxPool`.
    padding : int, tuple of int, or tuple of pairs
        Zeros on both sides.

    Examples
    --------
    >>> import numpy as np
    >>> AveragePool((2,), stride=1, padding=1).forward((), np.asarray([[[2.0], [4.0]]]))[0][0, :, 0]
    array([1., 3., 2.])
    """

    window: int | tuple[int, ...]
    stride: int | tuple[int, ...] | None = None
    padding: Padding = 0

    def __post_init__(self) -> None:
        _check_windows(self)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return _windowed_shape(self, shape)

    def _tangent(self, cache: Tree, dx: Array) -> Array:
        geometry = _geometry(self, tuple(cache))
        y = pad(dx, geometry.padding)
        # One axis after another: k + k taps, not k · k.
        for axis, size in enumerate(geometry.output_size(tuple(cache)[:-1])):
            each = [y[window] for window in _taps(geometry, axis, size)]
            y = sum(each[1:], start=each[0])
        return y * (1.0 / geometry.taps)

    def _linear_transpose(self, shape: tuple[int, ...], g: Array) -> Array:
        xp, geometry = array_namespace(g), _geometry(self, shape)
        size, padded = geometry.output_size(shape[:-1]), geometry.padded_size(shape[:-1])
        g = g * (1.0 / geometry.taps)
        for axis in reversed(range(len(size))):
            spread = (*g.shape[: axis + 1], padded[axis], *g.shape[axis + 2 :])
            dx = xp.zeros(spread, dtype=g.dtype, device=g.device)
            for window in _taps(geometry, axis, size[axis]):
                dx[window] += g
            g = dx
        return pad(g, tuple((-low, -high) for low, high in geometry.padding))


@final
@dataclass(frozen=True, repr=False)
class AdaptiveAveragePool(MeanPool):
    """y = mean over bins of x, as many bins as asked for, whatever the size of x.

    Of n pixels along an axis, bin i of o holds those from ⌊i n / o⌋ up to ⌈(i + 1) n / o⌉: all
    pixels are in some bin, and some may be in two.

    Parameters
    ----------
    output : int or tuple of int
        Number of bins along each spatial axis, or one number for all of them.

    Examples
    --------
    >>> import numpy as np
    >>> AdaptiveAveragePool((2,)).forward((), np.asarray([[[1.0], [2.0], [6.0]]]))[0][0, :, 0]
    array([1.5, 4. ])
    """

    output: int | tuple[int, ...]

    def __post_init__(self) -> None:
        plain_fields(self)
        check_axes("AdaptiveAveragePool", self.output, argument="output", free=True)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        bins = per_axis(self.output, max(len(shape) - 1, 1))
        require_channels(self, len(bins), None, shape)
        return (*bins, shape[-1])

    def _tangent(self, cache: Tree, dx: Array) -> Array:
        for axis, m in enumerate(self._means(tuple(cache), dx), start=1):
            dx = _on_axis(m, dx, axis)
        return dx

    def _linear_transpose(self, shape: tuple[int, ...], g: Array) -> Array:
        for axis, m in enumerate(self._means(shape, g), start=1):
            g = _on_axis(m.T, g, axis)
        return g

    def _means(self, shape: tuple[int, ...], like: Array) -> list[Array]:
        """For each spatial axis the matrix (bins, n) that takes the mean over each bin."""
        found = []
        for n, bins in zip(shape[:-1], self.output_shape(shape)[:-1], strict=True):
            ends = [(i * n // bins, -(-(i + 1) * n // bins)) for i in range(bins)]
            rows = [
                [1.0 / (stop - start) if start <= j < stop else 0.0 for j in range(n)]
                for start, stop in ends
            ]
            found.append(Backend.of(like).asarray(rows))
        return found


@final
@dataclass(frozen=True)
class GlobalAveragePool(MeanPool):
    """y = mean of x over all locations, (N, ..., C) to (N, C): of an image, or of a sequence.

    Examples
    --------
    >>> import numpy as np
    >>> GlobalAveragePool().forward((), np.ones((2, 3, 4, 5)))[0].shape
    (2, 5)
    """

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return _global_shape(self, shape)

    def _tangent(self, cache: Tree, dx: Array) -> Array:
        return array_namespace(dx).mean(_one_axis_of_locations(dx), axis=1)

    def _linear_transpose(self, shape: tuple[int, ...], g: Array) -> Array:
        xp, (n, c) = array_namespace(g), g.shape
        g = xp.reshape(g * (1.0 / math.prod(shape[:-1])), (n, *(1,) * (len(shape) - 1), c))
        return g + xp.zeros((n, *shape), dtype=g.dtype, device=g.device)


@final
@dataclass(frozen=True)
class GlobalMaxPool(Parameterless):
    """y = largest x over all locations, (N, ..., C) to (N, C); the first of equals wins.

    Examples
    --------
    >>> import numpy as np
    >>> y, cache = GlobalMaxPool().forward((), np.asarray([[[1.0], [3.0], [3.0]]]))
    >>> GlobalMaxPool().backward((), cache, y)[0][0, :, 0]
    array([0., 3., 0.])
    """

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return _global_shape(self, shape)

    def forward(self, params: Tree, x: Array, rng: Rng | None = None) -> tuple[Array, Tree]:
        shape = x.shape[1:]
        self.output_shape(shape)
        xp, x = array_namespace(x), _one_axis_of_locations(x)
        return xp.max(x, axis=1), (xp.argmax(x, axis=1), shape)

    def take(self, cache: Tree, rows: slice) -> Tree:
        winner, shape = cache
        return winner[rows, ...], shape

    def _selected(self, cache: Tree, like: Array) -> Array:
        """1 where the largest is, 0 elsewhere, shape (N, T, C)."""
        winner, shape = cache
        xp = array_namespace(winner)
        t = xp.arange(math.prod(shape[:-1]), dtype=winner.dtype, device=winner.device)
        return xp.astype(winner[:, None, :] == t[:, None], like.dtype)

    def _tangent(self, cache: Tree, dx: Array) -> Array:
        products = self._selected(cache, dx) * _one_axis_of_locations(dx)
        return array_namespace(dx).sum(products, axis=1)

    def _transpose(self, cache: Tree, g: Array) -> Array:
        dx = self._selected(cache, g) * g[..., None, :]
        return array_namespace(g).reshape(dx, (*g.shape[:-1], *cache[1]))


def _check_windows(pool: MaxPool | AveragePool) -> None:
    plain_fields(pool)
    tuples = [v for v in (pool.window, pool.stride, pool.padding) if isinstance(v, tuple)]
    if is_integer(pool.window) and tuples:  # these say how many axes there are
        object.__setattr__(pool, "window", per_axis(pool.window, len(tuples[0])))
    name, stride = type(pool).__name__, 1 if pool.stride is None else pool.stride
    check_axes(name, pool.window, argument="window", free=True, stride=stride)
    axes = len(pool.window) if isinstance(pool.window, tuple) else 1
    check_padding(name, pool.padding, axes, ())


@functools.lru_cache(maxsize=1024)
def _geometry(pool: MaxPool | AveragePool, shape: tuple[int, ...]) -> Geometry:
    """Windows on an example of `shape`."""
    axes = len(pool.window) if isinstance(pool.window, tuple) else max(len(shape) - 1, 1)
    window = per_axis(pool.window, axes)
    steps = window if pool.stride is None else per_axis(pool.stride, axes)
    return Geometry(window, steps, (1,) * axes, padding_pairs(pool.padding, axes))


def _windowed_shape(pool: MaxPool | AveragePool, shape: tuple[int, ...]) -> tuple[int, ...]:
    geometry = _geometry(pool, shape)
    require_channels(pool, len(geometry.kernel), None, shape)
    try:
        return (*geometry.output_size(shape[:-1]), shape[-1])
    except ShapeError as error:
        raise error.within(repr(pool)) from None


def _taps(geometry: Geometry, axis: int, size: int) -> list[tuple[Any, ...]]:
    """What each tap along one spatial axis looks at, for `size` windows along it."""
    k, s = geometry.kernel[axis], geometry.stride[axis]
    before = (slice(None),) * (axis + 1)
    return [(*before, slice(i, i + (size - 1) * s + 1, s), ...) for i in range(k)]


def _global_shape(layer: Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) < 2 or 0 in shape:
        raise layer.wrong_inputs("(N, ..., C), nothing empty", shape)
    return shape[-1:]


def _on_axis(m: Array, x: Array, axis: int) -> Array:
    """m @ x along one axis."""
    xp = array_namespace(m, x)
    lead, n, rest = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    y = m @ xp.reshape(x, (math.prod(lead), n, math.prod(rest)))
    return xp.reshape(y, (*lead, m.shape[0], *rest))


def _one_axis_of_locations(x: Array) -> Array:
    """(N, ..., C) to (N, T, C)."""
    return array_namespace(x).reshape(x, (x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]))
