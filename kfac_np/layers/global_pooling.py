"""Pooling to a fixed size: over bins, and over all locations.

Arrays are (N, ..., C), channels last; every channel is pooled on its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, Backend, array_namespace
from kfac_np.errors import ShapeError
from kfac_np.layers.base import Layer
from kfac_np.layers.pooling import LinearPool, Pool
from kfac_np.layers.spatial import check_axes, per_axis, require_channels
from kfac_np.trees import Tree
from kfac_np.validation import plain_fields

__all__ = ["AdaptiveAveragePool", "GlobalAveragePool", "GlobalMaxPool"]


@final
@dataclass(frozen=True)
class AdaptiveAveragePool(LinearPool):
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

    def __repr__(self) -> str:
        return f"AdaptiveAveragePool({self.output})"

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        bins = self._along_each(shape)
        require_channels(self, len(bins), None, shape)
        return (*bins, shape[-1])

    def _tangent(self, cache: Tree, dx: Array) -> Array:
        each = zip(cache[:-1], self._along_each(cache), strict=True)
        for axis, (n, bins) in enumerate(each, start=1):
            dx = _on_axis(_bins(n, bins, dx), dx, axis)
        return dx

    def _linear_transpose(self, shape: tuple[int, ...], g: Array) -> Array:
        each = zip(shape[:-1], self._along_each(shape), strict=True)
        for axis, (n, bins) in enumerate(each, start=1):
            g = _on_axis(_bins(n, bins, g).T, g, axis)
        return g

    def _along_each(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Bins along each spatial axis of an example of `shape`."""
        return per_axis(self.output, max(len(shape) - 1, 1))


@final
@dataclass(frozen=True)
class GlobalAveragePool(LinearPool):
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
class GlobalMaxPool(Pool):
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

    def forward(self, params: Tree, x: Array) -> tuple[Array, Tree]:
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


def _global_shape(layer: Layer, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) < 2 or 0 in shape:
        came = ", ".join(map(str, ("N", *shape)))
        raise ShapeError(f"{layer!r}: expected inputs (N, ..., C), nothing empty, got ({came})")
    return shape[-1:]


def _bins(n: int, bins: int, like: Array) -> Array:
    """The matrix (bins, n) that takes the mean over each bin."""
    rows = []
    for i in range(bins):
        start, stop = i * n // bins, -(-(i + 1) * n // bins)
        rows.append([1.0 / (stop - start) if start <= j < stop else 0.0 for j in range(n)])
    return Backend.of(like).asarray(rows)


def _on_axis(m: Array, x: Array, axis: int) -> Array:
    """m @ x along one axis."""
    xp = array_namespace(m, x)
    lead, n, rest = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    y = m @ xp.reshape(x, (math.prod(lead), n, math.prod(rest)))
    return xp.reshape(y, (*lead, m.shape[0], *rest))


def _one_axis_of_locations(x: Array) -> Array:
    """(N, ..., C) to (N, T, C)."""
    return array_namespace(x).reshape(x, (x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]))
