"""What a convolution sees at each location: patches, unfolded a few examples at a time.

Arrays are laid out (N, *spatial, C), channels last: a patch is then a row whose channels lie side
by side, the affine map of a convolution is a matrix product on the last axis like that of a dense
layer, and nothing is ever transposed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import array_api_compat
import numpy as np

from kfac_np.backend import lags, strips, threads, winograd
from kfac_np.backend.array import Array, array_namespace
from kfac_np.backend.kernels import second_moment
from kfac_np.errors import ShapeError

__all__ = [
    "Geometry",
    "Patches",
    "fold",
    "pad",
    "patch_budget",
    "transposed_product",
    "transposed_product_generic",
    "unfold",
    "unfold_generic",
]


PIECE_BYTES = 2**20
"""Of rows that are summed together, on a processor."""

FEWEST_LOCATIONS = 8
"""Of an example, from which on its strips are worth a product of their own."""


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
        padded = self.padded_size(size)
        if any(n < e for n, e in zip(padded, self.extent, strict=True)):
            raise ShapeError(f"expected a padded size of at least {self.extent}, got {padded}")
        return tuple(
            (n - e) // s + 1 for n, e, s in zip(padded, self.extent, self.stride, strict=True)
        )

    def windows(self, out: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
        """For each tap, in row-major order, the slices of the padded input that it looks at."""
        for tap in itertools.product(*map(range, self.kernel)):
            yield tuple(
                slice(i * d, i * d + (n - 1) * s + 1, s)
                for i, d, s, n in zip(tap, self.dilation, self.stride, out, strict=True)
            )


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
    if not array_api_compat.is_numpy_namespace(xp):
        out = xp.full(shape, value, dtype=x.dtype, device=x.device)
        out[:, *inner, :] = x[:, *outer, :]
        return out
    out = np.empty(shape, dtype=x.dtype)

    def write(examples: slice) -> None:
        out[examples] = value
        out[examples, *inner, :] = x[examples, *outer, :]  # over what is in the cache still

    step = _examples_at_once(x, math.prod(shape[1:]), PIECE_BYTES)
    threads.each(write, threads.cut(shape[0], step))
    return out


def _require_left(size: tuple[int, ...], padding: tuple[tuple[int, int], ...]) -> None:
    cut = (max(-low, 0) + max(-high, 0) for low, high in padding)
    if any(c and c >= n for n, c in zip(size, cut, strict=True)):
        raise ShapeError(f"expected something to be left of {tuple(size)} after padding {padding}")


def unfold_generic(x: Array, geometry: Geometry, ones: bool = False) -> Array:
    """`unfold`, one slice for each tap, by the standard alone.

    Examples
    --------
    >>> import numpy as np
    >>> unfold_generic(np.arange(4.0).reshape(1, 4, 1), Geometry((2,), (2,), (1,), ((0, 0),)))[0]
    array([[0., 1.],
           [2., 3.]])
    """
    n, out, c, shape = _patch_shape(x, geometry, ones)
    xp = array_namespace(x)
    rows = xp.empty(shape, dtype=x.dtype, device=x.device)
    for i, window in enumerate(geometry.windows(out)):
        rows[..., i * c : (i + 1) * c] = xp.reshape(x[:, *window, :], (n, math.prod(out), c))
    if ones:
        rows[..., -1:] = 1.0
    return rows


def unfold(x: Array, geometry: Geometry, ones: bool = False) -> Array:
    """The patches of a padded input as rows.

    Parameters
    ----------
    x : Array, shape (N, *spatial, C)
        Already padded.
    geometry : Geometry
    ones : bool
        Append the homogeneous coordinate.

    Returns
    -------
    Array, shape (N, T, taps · C [+ 1])
        Columns run over taps, then channels.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(4.0).reshape(1, 4, 1)
    >>> unfold(x, Geometry((2,), (1,), (1,), ((0, 0),)), ones=True)[0]
    array([[0., 1., 1.],
           [1., 2., 1.],
           [2., 3., 1.]])
    """
    xp = array_namespace(x)
    if not (array_api_compat.is_numpy_namespace(xp) or array_api_compat.is_cupy_namespace(xp)):
        return unfold_generic(x, geometry, ones)
    n, out, c, shape = _patch_shape(x, geometry, ones)
    d = geometry.taps * c
    # A view of all patches, copied in one go: neighbouring taps lie side by side in memory, so that
    # the copy moves whole rows of the kernel.
    first, *strides, last = x.strides  # type: ignore[attr-defined]
    taps = [s * i for s, i in zip(strides, geometry.dilation, strict=True)]
    steps = [s * i for s, i in zip(strides, geometry.stride, strict=True)]
    split = (n, *out, *geometry.kernel, c)
    view = _as_strided(xp, x, split, (first, *steps, *taps, last))
    rows = xp.empty((n, *out, shape[-1]), dtype=x.dtype)
    rows[..., :d].reshape(split)[...] = view  # splitting an axis makes a view, not a copy
    rows[..., d:] = 1.0
    return xp.reshape(rows, shape)


def fold(rows: Array, geometry: Geometry, padded_size: tuple[int, ...]) -> Array:
    """The adjoint of `unfold`: add every patch back to where it was taken from.

    Parameters
    ----------
    rows : Array, shape (N, T, taps · C)
    geometry : Geometry
    padded_size : tuple of int
        Sizes of the padded input.

    Returns
    -------
    Array, shape (N, *padded_size, C)

    Examples
    --------
    >>> import numpy as np
    >>> geometry = Geometry((2,), (1,), (1,), ((0, 0),))
    >>> fold(np.ones((1, 3, 2)), geometry, (4,))[0, :, 0]
    array([1., 2., 2., 1.])
    """
    xp, c = array_namespace(rows), rows.shape[-1] // geometry.taps
    x = xp.zeros((rows.shape[0], *padded_size, c), dtype=rows.dtype, device=rows.device)
    _add_patches(x, slice(None), rows, geometry)
    return x


def _add_patches(x: Array, examples: slice, rows: Array, geometry: Geometry) -> None:
    """Fold the rows into some examples of x."""
    n, c = rows.shape[0], x.shape[-1]
    out = geometry.unpadded.output_size(x.shape[1:-1])
    for i, window in enumerate(geometry.windows(out)):
        part = rows[..., i * c : (i + 1) * c]
        x[examples, *window, :] += array_namespace(rows).reshape(part, (n, *out, c))


def transposed_product_generic(
    g: Array, w: Array, geometry: Geometry, size: tuple[int, ...], budget_bytes: int
) -> Array:
    """`transposed_product` by folding patches: for every geometry.

    Examples
    --------
    >>> import numpy as np
    >>> geometry = Geometry((2,), (2,), (1,), ((0, 0),))
    >>> g, w = np.asarray([[[1.0], [2.0]]]), np.asarray([[1.0, 10.0]])
    >>> transposed_product_generic(g, w, geometry, (4,), 1000)[0, :, 0]
    array([ 1., 10.,  2., 20.])
    """
    xp = array_namespace(g, w)
    n, *out, c_out = g.shape
    t, c = math.prod(out), w.shape[1] // geometry.taps
    x = xp.zeros((n, *geometry.padded_size(size), c), dtype=g.dtype, device=g.device)
    step = _examples_at_once(g, t * w.shape[1], budget_bytes)
    for examples in threads.cut(n, step):
        rows = xp.reshape(g[examples, ...], (-1, c_out)) @ w
        _add_patches(x, examples, xp.reshape(rows, (-1, t, w.shape[1])), geometry)
        del rows  # before the next ones are made
    return pad(x, tuple((-low, -high) for low, high in geometry.padding))


def transposed_product(
    g: Array, w: Array, geometry: Geometry, size: tuple[int, ...], budget_bytes: int
) -> Array:
    """The adjoint of x ↦ patches(x) wᵀ: derivatives at the locations, carried to the pixels.

    Parameters
    ----------
    g : Array, shape (N, *out, c_out)
    w : Array, shape (c_out, taps · C)
    geometry : Geometry
    size : tuple of int
        Spatial size of the input.
    budget_bytes : int
        The most bytes of patches alive at once (one example at least).

    Returns
    -------
    Array, shape (N, *size, C)

    Examples
    --------
    >>> import numpy as np
    >>> geometry = Geometry((2,), (1,), (1,), ((1, 0),))
    >>> g, w = np.ones((1, 3, 1)), np.asarray([[1.0, 10.0]])
    >>> transposed_product(g, w, geometry, (3,), 1000)[0, :, 0]
    array([11., 11., 10.])
    """
    if any(s != 1 for s in geometry.stride):
        return transposed_product_generic(g, w, geometry, size, budget_bytes)
    # Without strides this is a convolution, too: of g, by the kernel turned round. Unfolding g
    # and one product is faster than a product and folding, which adds slice by slice.
    xp = array_namespace(g, w)
    c_out, axes = g.shape[-1], len(size)
    padding = tuple(
        (e - 1 - low, e - 1 - high)
        for e, (low, high) in zip(geometry.extent, geometry.padding, strict=True)
    )
    kernel = xp.reshape(w, (c_out, *geometry.kernel, -1))
    kernel = xp.flip(kernel, axis=tuple(range(1, axes + 1)))
    kernel = xp.permute_dims(kernel, (*range(1, axes + 1), 0, axes + 1))
    turned = xp.reshape(kernel, (geometry.taps * c_out, -1))
    return Patches(pad(g, padding), geometry, False, budget_bytes).product(turned)


@final
@dataclass(frozen=True, eq=False)
class Patches:
    """The patches of an input, unfolded when and where they are asked for.

    Stands for the array of shape (N, T, d) without holding it: only the padded input is kept. What
    walks over `chunks` never has more than `budget_bytes` of patches alive (one example at least),
    and works on rows that are still in the processor's cache.

    Attributes
    ----------
    x : Array, shape (N, *spatial, C)
        The padded input.
    geometry : Geometry
    ones : bool
        Whether the homogeneous coordinate is appended.
    budget_bytes : int

    Examples
    --------
    >>> import numpy as np
    >>> patches = Patches(np.ones((5, 4, 1)), Geometry((2,), (1,), (1,), ((0, 0),)), True, 100)
    >>> patches.shape, [chunk.shape[0] for _, chunk in patches.chunks()]
    ((5, 3, 3), [1, 1, 1, 1, 1])
    """

    x: Array
    geometry: Geometry
    ones: bool
    budget_bytes: int

    @cached_property
    def out(self) -> tuple[int, ...]:
        """Number of locations along each spatial axis."""
        return self.geometry.unpadded.output_size(self.x.shape[1:-1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, T, d)."""
        d = self.geometry.taps * self.x.shape[-1] + self.ones
        return (self.x.shape[0], math.prod(self.out), d)

    @property
    def ndim(self) -> int:
        """3."""
        return 3

    def take(self, rows: slice) -> Patches:
        """The patches of some examples."""
        return Patches(self.x[rows, ...], self.geometry, self.ones, self.budget_bytes)

    def array(self) -> Array:
        """All of them at once, shape (N, T, d)."""
        return unfold(self.x, self.geometry, self.ones)

    def chunks(self) -> Iterator[tuple[slice, Array]]:
        """Slices of examples and their unfolded rows (n, T, d), within the budget.

        Let go of the rows before asking for the next ones.
        """
        n, t, d = self.shape
        step = _examples_at_once(self.x, t * d, self.budget_bytes)
        for rows in threads.cut(n, step):
            yield rows, unfold(self.x[rows, ...], self.geometry, self.ones)

    def product(self, m: Array) -> Array:
        """Patches times a matrix (d, d_out): the affine map of a convolution.

        Returns
        -------
        Array, shape (N, *out, d_out)
        """
        if not self._by_strips:
            return self.product_generic(m)
        x: Any = self.x
        kernel: Any = m[: self.shape[2] - self.ones, :]
        bias: Any = m[-1, :] if self.ones else None
        y: Any = np.empty((x.shape[0], *self.out, m.shape[1]), dtype=x.dtype)
        if winograd.pays(x, *self._moves, m.shape[1]):
            taps, _, dilation = self._moves
            winograd.product(x, taps, dilation, kernel, bias, y, self.budget_bytes)
        else:
            rows = y.reshape(*self.shape[:2], m.shape[1])
            strips.product(x, *self._moves, kernel, bias, rows, self.budget_bytes)
        return y

    def product_generic(self, m: Array) -> Array:
        """`product`, by unfolding, with the standard alone."""
        xp = array_namespace(self.x, m)
        n, t, d = self.shape
        y = xp.empty((n, t, m.shape[1]), dtype=self.x.dtype, device=self.x.device)
        for rows, chunk in self.chunks():
            flat = xp.reshape(chunk, (-1, d)) @ m
            y[rows, ...] = xp.reshape(flat, (-1, t, m.shape[1]))
            del chunk  # before the next one is unfolded
        return xp.reshape(y, (n, *self.out, m.shape[1]))

    def gradient(self, g: Array) -> Array:
        """Sum over examples and locations of g āᵀ: the gradient of a convolution's matrix.

        Parameters
        ----------
        g : Array, shape ([K,] N, T, d_out)

        Returns
        -------
        Array, shape ([K,] d_out, d)
        """
        if not self._by_strips:
            return self.gradient_generic(g)
        x: Any = self.x
        each: Any = g if g.ndim == 4 else g[None, ...]
        total = np.zeros((len(each), g.shape[-1], self.shape[2]), dtype=x.dtype)
        for v, sums in zip(each, total, strict=True):
            columns = self.shape[2] - self.ones
            if winograd.pays(x, *self._moves, g.shape[-1]):
                taps, _, dilation = self._moves
                locations = v.reshape(x.shape[0], *self.out, g.shape[-1])
                kernel = winograd.gradient(x, taps, dilation, locations, self.budget_bytes)
            else:
                kernel = strips.gradient(x, *self._moves, v, self.budget_bytes)
            sums[:, :columns] = kernel
            if self.ones:
                for part in threads.in_order(_sum_of_rows, _pieces(v.reshape(-1, v.shape[-1]))):
                    sums[:, -1] += part
        return total.reshape(*g.shape[:-3], *total.shape[1:])

    def gradient_generic(self, g: Array) -> Array:
        """`gradient`, by unfolding, with the standard alone."""
        xp, (_, t, d) = array_namespace(self.x, g), self.shape
        total = xp.zeros((*g.shape[:-3], g.shape[-1], d), dtype=g.dtype, device=g.device)
        for rows, chunk in self.chunks():
            count = (rows.stop - rows.start) * t
            flat = xp.reshape(g[..., rows, :, :], (*g.shape[:-3], count, g.shape[-1]))
            total += xp.matrix_transpose(flat) @ xp.reshape(chunk, (-1, d))
            del chunk  # before the next one is unfolded
        return total

    def second_moment(self) -> Array:
        """Sum over examples and locations of ā āᵀ, shape (d, d).

        Without weights, so that patches that overlap have products in common.
        """
        taps, step = self.geometry.kernel[0], self.geometry.dilation[0]
        overlap = len(self.out) == 2 and self.geometry.stride[0] == 1 and taps > 1
        if not (self._by_strips and overlap and self.out[0] > (taps - 1) * step):
            return self.second_moment_generic()
        x: Any = self.x
        (kernel, stride, dilation), d = self._moves, self.shape[2]
        by_pixels = stride[1] == 1 and self.out[1] > (kernel[1] - 1) * dilation[1]
        if by_pixels and x.shape[-1] >= lags.FEWEST_CHANNELS:
            moment, sums = lags.second_moment(x, kernel, dilation, self.budget_bytes)
        else:
            moment, sums = strips.second_moment(x, kernel, stride[1], dilation, self.budget_bytes)
        if not self.ones:
            return moment
        total = np.empty((d, d), dtype=x.dtype)
        total[:-1, :-1] = moment
        total[:-1, -1] = total[-1, :-1] = sums
        total[-1, -1] = self.shape[0] * self.shape[1]
        return total

    def second_moment_generic(self) -> Array:
        """`second_moment`, by unfolding, with the standard alone."""
        d = self.shape[2]
        total = array_namespace(self.x).zeros((d, d), dtype=self.x.dtype, device=self.x.device)
        for _, chunk in self.chunks():
            total += second_moment(array_namespace(chunk).reshape(chunk, (-1, d)))
            del chunk  # before the next one is unfolded
        return total

    @property
    def _by_strips(self) -> bool:
        """Whether strips are faster than patches: not for a handful of locations."""
        numpy = array_api_compat.is_numpy_namespace(array_namespace(self.x))
        return numpy and self.shape[1] >= FEWEST_LOCATIONS

    @property
    def _moves(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return self.geometry.kernel, self.geometry.stride, self.geometry.dilation


def patch_budget(x: Array) -> int:
    """Bytes of patches to unfold at once where the caller does not say.

    On a processor as much as stays in its cache: unfolding there costs next to nothing beside the
    product that follows. On a GPU so much that few kernels are launched.

    Examples
    --------
    >>> import numpy as np
    >>> patch_budget(np.zeros(1))
    8388608
    """
    return 2**30 if array_api_compat.is_cupy_array(x) else 2**23


def _pieces(rows: Any) -> list[Any]:
    """Rows cut to what stays in the cache of a core."""
    step = max(1, PIECE_BYTES // max(1, rows.itemsize * rows.shape[1]))
    return [rows[part] for part in threads.cut(len(rows), step)]


def _sum_of_rows(rows: Any) -> Any:
    return np.ones(len(rows), dtype=rows.dtype) @ rows


def _examples_at_once(x: Array, numbers: int, budget_bytes: int) -> int:
    """How many examples of so many numbers each the budget holds; one at least."""
    xp = array_namespace(x)
    info = xp.finfo if xp.isdtype(x.dtype, "real floating") else xp.iinfo
    item = info(x.dtype).bits // 8
    return max(1, budget_bytes // max(1, numbers * item))


def _patch_shape(
    x: Array, geometry: Geometry, ones: bool
) -> tuple[int, tuple[int, ...], int, tuple[int, int, int]]:
    n, *size, c = x.shape
    out = geometry.unpadded.output_size(tuple(size))
    return n, out, c, (n, math.prod(out), geometry.taps * c + ones)


def _as_strided(xp: Any, x: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    if array_api_compat.is_cupy_namespace(xp):
        import cupy

        return cupy.lib.stride_tricks.as_strided(x, shape, strides)
    return np.lib.stride_tricks.as_strided(x, shape, strides, writeable=False)
