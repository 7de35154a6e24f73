"""Products with patches by unfolding and folding them, by the standard alone or nearly so.

What runs where no kernel of a library is faster, and what such kernels are compared with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import array_api_compat
import numpy as np

from kfac_np.backend.array import Array, array_namespace
from kfac_np.backend.chunks import cut, examples_at_once
from kfac_np.backend.geometry import Geometry, pad
from kfac_np.backend.kernels import second_moment

if TYPE_CHECKING:
    from kfac_np.backend.patches import Patches

__all__ = ["Unfolding", "fold", "transposed_product_generic", "unfold", "unfold_generic"]


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
    step = examples_at_once(g, t * w.shape[1], budget_bytes)
    for examples in cut(n, step):
        rows = xp.reshape(g[examples, ...], (-1, c_out)) @ w
        _add_patches(x, examples, xp.reshape(rows, (-1, t, w.shape[1])), geometry)
        del rows  # before the next ones are made
    return pad(x, tuple((-low, -high) for low, high in geometry.padding))


@final
@dataclass(frozen=True, eq=False)
class Unfolding:
    """`Patches.product`, `gradient` and `second_moment` on unfolded rows, chunk by chunk.

    Examples
    --------
    >>> from kfac_np.backend.patches import Patches
    >>> patches = Patches(np.ones((5, 4, 1)), Geometry((2,), (1,), (1,), ((0, 0),)), False, 100)
    >>> Unfolding(patches).second_moment()
    array([[15., 15.],
           [15., 15.]])
    """

    patches: Patches

    def product(self, m: Array) -> Array:
        """`Patches.product`."""
        p = self.patches
        xp, (n, t, d) = array_namespace(p.x, m), p.shape
        y = xp.empty((n, t, m.shape[1]), dtype=p.x.dtype, device=p.x.device)
        for rows, chunk in p.chunks():
            flat = xp.reshape(chunk, (-1, d)) @ m
            y[rows, ...] = xp.reshape(flat, (-1, t, m.shape[1]))
            del chunk  # before the next one is unfolded
        return xp.reshape(y, (n, *p.out, m.shape[1]))

    def gradient(self, g: Array) -> Array:
        """`Patches.gradient`."""
        xp, (_, t, d) = array_namespace(self.patches.x, g), self.patches.shape
        total = xp.zeros((*g.shape[:-3], g.shape[-1], d), dtype=g.dtype, device=g.device)
        for rows, chunk in self.patches.chunks():
            count = (rows.stop - rows.start) * t
            flat = xp.reshape(g[..., rows, :, :], (*g.shape[:-3], count, g.shape[-1]))
            total += xp.matrix_transpose(flat) @ xp.reshape(chunk, (-1, d))
            del chunk  # before the next one is unfolded
        return total

    def second_moment(self) -> Array:
        """`Patches.second_moment`."""
        x, d = self.patches.x, self.patches.shape[2]
        xp = array_namespace(x)
        total = xp.zeros((d, d), dtype=x.dtype, device=x.device)
        for _, chunk in self.patches.chunks():
            total += second_moment(xp.reshape(chunk, (-1, d)))
            del chunk  # before the next one is unfolded
        return total


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
