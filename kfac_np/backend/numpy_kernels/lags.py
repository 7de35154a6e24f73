"""Second moments of patches of many channels: every pair of pixels is multiplied once.

Entry (i, j) of the moment, for taps i and j, is a sum over locations t of x[t + i] x[t + j]ᵀ, and
so of pairs of pixels that lie j - i apart. Taps that are equally far apart share these pairs but
for some at the border: sums over single rows and columns there, and over all between them, make
every entry. Of 5 × 5 taps that is 7 times fewer operations than unfolding and a symmetric product.

NumPy only; `kfac_np.backend.unfolding.Unfolding` computes the same by the standard alone.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from kfac_np.backend.chunks import cut
from kfac_np.backend.geometry import Geometry
from kfac_np.backend.numpy_kernels import threads
from kfac_np.backend.numpy_kernels.strips import SMALL_PRODUCT, blocks_of_rows

__all__ = ["pays", "second_moment"]

HostArray = np.ndarray[Any, Any]

CACHE_BYTES = 2**22
"""Of pixels that are multiplied together."""

FEWEST_CHANNELS = 16
"""With fewer, products of pixels are slower than those of strips."""

FEWEST_MULTIPLICATIONS = 5 * 10**6
"""Of a lag. With fewer, threads cost more than they save, and lags are computed in turn."""


def pays(x: HostArray, geometry: Geometry, out: tuple[int, ...]) -> bool:
    """Tell whether lags are faster than strips, for patches that `overlap` along the first axis.

    Examples
    --------
    >>> geometry = Geometry((3, 3), (1, 1), (1, 1), ((0, 0), (0, 0)))
    >>> [pays(np.empty((1, 10, 10, c)), geometry, (8, 8)) for c in (3, 32)]
    [False, True]
    """
    step = geometry.dilation[1]
    overlap = geometry.stride[1] == 1 and out[1] > (geometry.kernel[1] - 1) * step
    return overlap and x.shape[-1] >= FEWEST_CHANNELS


def second_moment(
    x: HostArray, geometry: Geometry, budget_bytes: int
) -> tuple[HostArray, HostArray]:
    """Sum over examples and locations of a aᵀ, and of a, for patches a.

    Parameters
    ----------
    x : shape (N, H, W, C)
        Already padded; more locations along each axis than the kernel's extent less one.
    geometry : Geometry
        Of two axes, without strides.
    budget_bytes : int
        The most bytes of x looked at together (one example at least).

    Returns
    -------
    moment : shape (d, d), d = taps · C
    sums : shape (d,)

    Examples
    --------
    >>> x = np.arange(9.0).reshape(1, 3, 3, 1)
    >>> geometry = Geometry((2, 1), (1, 1), (1, 1), ((0, 0), (0, 0)))
    >>> moment, sums = second_moment(x, geometry, 1000)
    >>> moment, sums
    (array([[ 55., 100.],
           [100., 199.]]), array([15., 33.]))
    """
    (high, wide), (down, across) = geometry.kernel, geometry.dilation
    height, width, c = x.shape[1:]
    inner = height - (high - 1) * down, width - (wide - 1) * across
    rows = [blocks_of_rows(inner[0], down, high - 1 - i) for i in range(high)]
    columns = [blocks_of_rows(inner[1], across, wide - 1 - i) for i in range(wide)]
    # For each lag: both orders of its factors, and blocks of columns and of rows.
    totals = {
        (i, j): np.zeros((2, len(columns[j]), len(rows[i]), c, c), dtype=x.dtype)
        for i, j in itertools.product(range(high), range(wide))
    }
    pixels = np.zeros((height, width, c), dtype=x.dtype)
    step = max(1, min(budget_bytes, CACHE_BYTES) // (height * width * c * x.itemsize))
    step = min(step, max(8, SMALL_PRODUCT // (inner[1] * c * c)))

    def add(examples: slice) -> None:
        part = np.ascontiguousarray(x[examples].transpose(1, 2, 0, 3))
        np.add(pixels, part.sum(axis=2), out=pixels)
        lit = np.asarray(part.any(axis=(2, 3)))
        seen = _not_zero(lit.any(axis=1)), _not_zero(lit.any(axis=0))

        def add_lag(lag: tuple[int, int]) -> None:
            i, j = lag
            _add_lag(totals[lag], part, (i * down, j * across), rows[i], columns[j], seen)

        if part.size * c < FEWEST_MULTIPLICATIONS:
            for lag in totals:
                add_lag(lag)
        else:
            threads.each(add_lag, totals)

    for examples in cut(x.shape[0], step):
        add(examples)
    moment = np.empty((high, wide, c, high, wide, c), dtype=x.dtype)
    for (i, j), total in totals.items():
        for row, column in itertools.product(range(high - i), range(wide - j)):
            # Blocks of a tap begin one later than those of the tap before, and end so.
            each = total[:, column : column + wide - j, row : row + high - i].sum(axis=(1, 2))
            _put(moment, (row, column), (row + i, column + j), each[0])
            if i and j:  # otherwise it is the transpose of the former
                _put(moment, (row, column + j), (row + i, column), each[1].T)
    sums = [
        pixels[row : row + inner[0], column : column + inner[1]].sum(axis=(0, 1))
        for row in range(0, high * down, down)
        for column in range(0, wide * across, across)
    ]
    d = geometry.taps * c
    return moment.reshape(d, d), np.concatenate(sums)


def _put(
    moment: HostArray, one: tuple[int, int], other: tuple[int, int], product: HostArray
) -> None:
    """An entry, and its transpose in the other half."""
    moment[one[0], one[1], :, other[0], other[1], :] = product
    moment[other[0], other[1], :, one[0], one[1], :] = product.T


def _add_lag(
    total: HostArray,
    x: HostArray,
    lag: tuple[int, int],
    rows: list[tuple[int, int]],
    columns: list[tuple[int, int]],
    seen: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    """Add products of pixels a lag apart, shape (2, columns, rows, C, C), of x (H, W, n, C).

    Beyond the rows and columns that are `seen` are zeros.
    """
    (down, across), c, ((top, bottom), (left, right)) = lag, x.shape[-1], seen
    bottom, right = bottom - down, right - across  # of the first factor
    if top >= bottom:
        return
    one, other = x[top:bottom], x[top + down : bottom + down]
    products = np.zeros((x.shape[0] - down, c, c), dtype=x.dtype)
    blocks = np.zeros((len(rows), len(products)), dtype=x.dtype)
    for block, (start, stop) in zip(blocks, rows, strict=True):
        block[start:stop] = 1.0
    orders = ((one, other), (other, one)) if down and across else ((one, other),)
    for i, (start, stop) in enumerate(columns):
        start, stop = max(start, left), min(stop, right)
        if start >= stop:
            continue
        for k, (a, b) in enumerate(orders):
            u = a[:, start:stop].reshape(bottom - top, -1, c)
            v = b[:, start + across : stop + across].reshape(bottom - top, -1, c)
            np.matmul(u.swapaxes(1, 2), v, out=products[top:bottom])
            total[k, i] += np.matmul(blocks, products.reshape(len(products), -1)).reshape(-1, c, c)


def _not_zero(found: Any) -> tuple[int, int]:
    """Where the first one is that is true, and the end of the last one."""
    if not found.any():
        return 0, 0
    return int(found.argmax()), len(found) - int(found[::-1].argmax())
