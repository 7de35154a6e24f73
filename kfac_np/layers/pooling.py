"""Pooling over windows: largest and mean values.

Arrays are (N, *spatial, C), channels last; every channel is pooled on its own.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from kfac_np.backend import Array, Backend, Geometry, Rng, array_namespace, pad
from kfac_np.backend.pooling import max_pool, max_pool_tangent, max_pool_transpose
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers.base import Layer
from kfac_np.layers.spatial import (
    Padding,
    check_axes,
    check_padding,
    options,
    padding_pairs,
    per_axis,
    require_channels,
)
from kfac_np.trees import Tree
from kfac_np.validation import is_integer, plain_fields

__all__ = ["AveragePool", "MaxPool"]


class Pool(Layer):
    """A layer without parameters that is linear once the cache is given: y = J x."""

    def init(self, rng: Rng, backend: Backend) -> Tree:
        return ()

    @abstractmethod
    def _transpose(self, cache: Tree, g: Array) -> Array:
        """Jᵀ g, for g of shape ([K,] N, ...)."""

    @abstractmethod
    def _tangent(self, cache: Tree, dx: Array) -> Array:
        """J dx."""

    def backward(
        self, params: Tree, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        return (self._transpose(cache, g) if wrt_input else None), ()

    def jvp(self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree) -> Array | None:
        return None if dx is None else self._tangent(cache, dx)

    def backward_jvp(
        self,
        params: Tree,
        cache: Tree,
        g: Array,
        dx: Array | None,
        dparams: Tree,
        dg: Array | None,
    ) -> tuple[Array | None, Tree]:
        return (None, ()) if dg is None else self.backward(params, cache, dg)


class LinearPool(Pool):
    """A pool that is linear in x; the cache is the shape of one example."""

    @abstractmethod
    def _linear_transpose(self, shape: tuple[int, ...], g: Array) -> Array:
        """Jᵀ g, for g without a K axis."""

    def forward(self, params: Tree, x: Array) -> tuple[Array, Tree]:
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
@dataclass(frozen=True)
class MaxPool(Pool):
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
    >>> MaxPool(2).output_shape((28, 28, 3))
    (14, 14, 3)
    """

    window: int | tuple[int, ...]
    stride: int | tuple[int, ...] | None = None
    padding: Padding = 0

    def __post_init__(self) -> None:
        _check_windows(self)
        window = _per_axis(self.window)
        pairs = padding_pairs(self.padding, len(window))
        if any(max(p) >= k for p, k in zip(pairs, window, strict=True)):
            raise InputError(
                f"MaxPool: expected padding of less than the window {self.window}, got "
                f"{self.padding!r}: a window that sees padding only has no largest pixel"
            )

    def __repr__(self) -> str:
        return _represent(self, self.window, stride=None, padding=0)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return _windowed_shape(self, _geometry(self, shape), shape)

    def forward(self, params: Tree, x: Array) -> tuple[Array, Tree]:
        self.output_shape(x.shape[1:])
        y, winners = max_pool(x, _geometry(self, x.shape[1:]))
        return y, (winners, x.shape[1:])

    def take(self, cache: Tree, rows: slice) -> Tree:
        winners, shape = cache
        return tuple(winner[rows, ...] for winner in winners), shape

    def _transpose(self, cache: Tree, g: Array) -> Array:
        winners, shape = cache
        return max_pool_transpose(g, winners, _geometry(self, shape), tuple(shape[:-1]))

    def _tangent(self, cache: Tree, dx: Array) -> Array:
        winners, shape = cache
        return max_pool_tangent(dx, winners, _geometry(self, shape))


@final
@dataclass(frozen=True)
class AveragePool(LinearPool):
    """y = mean over a window of x; the zeros of the padding count as pixels.

    The divisor is the size of the window everywhere. Sizes are rounded down, as by `MaxPool`.

    Parameters
    ----------
    window : int or tuple of int
        One entry for each spatial axis, or one number for all of them.
    stride : int or tuple of int, optional
        The window itself when omitted: windows side by side.
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

    def __repr__(self) -> str:
        return _represent(self, self.window, stride=None, padding=0)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return _windowed_shape(self, _geometry(self, shape), shape)

    def _tangent(self, cache: Tree, dx: Array) -> Array:
        geometry = _geometry(self, tuple(cache))
        out = geometry.output_size(tuple(cache)[:-1])
        y = pad(dx, geometry.padding)
        for axis, slices in _taps(geometry, out):  # one axis after another: k + k taps, not k · k
            each = [y[_along(axis, window)] for window in slices]
            y = sum(each[1:], start=each[0])
        return y * (1.0 / geometry.taps)

    def _linear_transpose(self, shape: tuple[int, ...], g: Array) -> Array:
        xp, geometry = array_namespace(g), _geometry(self, shape)
        size = shape[:-1]
        padded = geometry.padded_size(size)
        g = g * (1.0 / geometry.taps)
        for axis, slices in reversed(_taps(geometry, geometry.output_size(size))):
            spread = (*g.shape[:axis], padded[axis - 1], *g.shape[axis + 1 :])
            dx = xp.zeros(spread, dtype=g.dtype, device=g.device)
            for window in slices:
                dx[_along(axis, window)] += g
            g = dx
        return _crop(g, geometry)


def _check_windows(pool: MaxPool | AveragePool) -> None:
    plain_fields(pool)
    tuples = [v for v in (pool.window, pool.stride, pool.padding) if isinstance(v, tuple)]
    if is_integer(pool.window) and tuples:  # these say how many axes there are
        object.__setattr__(pool, "window", per_axis(pool.window, len(tuples[0])))
    name, stride = type(pool).__name__, 1 if pool.stride is None else pool.stride
    check_axes(name, pool.window, argument="window", free=True, stride=stride)
    check_padding(name, pool.padding, len(_per_axis(pool.window)), ())


def _per_axis(window: int | tuple[int, ...]) -> tuple[int, ...]:
    """The window along each axis; along one for all."""
    return window if isinstance(window, tuple) else (window,)


def _represent(layer: object, window: int | tuple[int, ...], **defaults: Any) -> str:
    return f"{type(layer).__name__}({', '.join([repr(window), *options(layer, **defaults)])})"


def _geometry(pool: MaxPool | AveragePool, shape: tuple[int, ...]) -> Geometry:
    """Windows on an example of `shape`."""
    axes = len(pool.window) if isinstance(pool.window, tuple) else max(len(shape) - 1, 1)
    window = per_axis(pool.window, axes)
    steps = window if pool.stride is None else per_axis(pool.stride, axes)
    return Geometry(window, steps, (1,) * axes, padding_pairs(pool.padding, axes))


def _windowed_shape(layer: Layer, geometry: Geometry, shape: tuple[int, ...]) -> tuple[int, ...]:
    require_channels(layer, len(geometry.kernel), None, shape)
    try:
        return (*geometry.output_size(shape[:-1]), shape[-1])
    except ShapeError as error:
        raise error.within(repr(layer)) from None


def _crop(x: Array, geometry: Geometry) -> Array:
    """The adjoint of padding with zeros."""
    return pad(x, tuple((-low, -high) for low, high in geometry.padding))


def _along(axis: int, window: slice) -> tuple[slice | Any, ...]:
    return (*(slice(None),) * axis, window, ...)


def _taps(geometry: Geometry, out: tuple[int, ...]) -> Sequence[tuple[int, list[slice]]]:
    """Axis, and the slice along it that each tap looks at."""
    each = zip(geometry.kernel, geometry.stride, out, strict=True)
    return [
        (axis, [slice(i, i + (n - 1) * s + 1, s) for i in range(k)])
        for axis, (k, s, n) in enumerate(each, start=1)
    ]
