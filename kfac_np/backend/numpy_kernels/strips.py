"""Products with patches on a CPU, without unfolding them: strips of a kernel's last axis.

A patch of a 5 × 5 kernel is five strips, one for each row of the kernel, and neighbouring locations
above one another share four of them. Unfolding the last axis alone makes every strip once. The
product with a kernel is then the sum of products of five views of the same strips, moved by a row
each, and what was 25 copies of the input is 5.

NumPy only; `kfac_np.backend.unfolding.Unfolding` computes the same by the standard alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from kfac_np.backend.chunks import cut
from kfac_np.backend.geometry import Geometry
from kfac_np.backend.numpy_kernels import threads

__all__ = ["Strips", "blocks_of_rows", "gradient", "overlap", "product", "second_moment"]

HostArray = np.ndarray[Any, Any]

CACHE_BYTES = 2**21
"""Of strips and products alive at once: about what is in the caches of one core."""

SMALL_PRODUCT = 10**6
"""OpenBLAS copies both factors before it multiplies, but for products with fewer multiplications
than this on processors with AVX-512. Matrices with 32 columns are multiplied nearly twice as fast
without; other libraries and processors do not mind the pieces, which have thousands of numbers."""


@final
@dataclass(frozen=True, eq=False)
class Strips:
    """The strips of some examples.

    Attributes
    ----------
    array : shape (n, *leading, W, K)
        For each padded pixel along the leading axes and each location along the last one, its
        K = taps · C numbers.
    taps : tuple of tuples of slices
        Where each tap of the leading axes looks.
    leading : tuple of int
        Number of locations along the leading axes.

    Examples
    --------
    >>> geometry = Geometry((2, 2), (1, 1), (1, 1), ((0, 0), (0, 0)))
    >>> strips = Strips.of(np.arange(6.0).reshape(1, 3, 2, 1), geometry)
    >>> strips.array[0, :, 0, :]
    array([[0., 1.],
           [2., 3.],
           [4., 5.]])
    >>> strips.split(100)
    (1, 2)
    >>> [view.shape for view in strips.views((1, 2))]
    [(1, 1, 2, 2), (1, 1, 2, 2)]
    """

    array: HostArray
    taps: tuple[tuple[slice, ...], ...]
    leading: tuple[int, ...]
    steps: tuple[int, ...]

    @classmethod
    def of(cls, x: HostArray, geometry: Geometry) -> Strips:
        """Strips of padded examples (n, *spatial, C)."""
        kernel, stride, dilation = geometry.kernel, geometry.stride, geometry.dilation
        if len(kernel) == 1:  # the examples are an axis that the kernel does not move along
            x = x[None, ...]
            kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
        *leading, width = (
            (n - d * (k - 1) - 1) // s + 1
            for n, k, s, d in zip(x.shape[1:-1], kernel, stride, dilation, strict=True)
        )
        taps = tuple(
            tuple(
                slice(i * d, i * d + (n - 1) * s + 1, s)
                for i, d, s, n in zip(tap, dilation, stride, leading, strict=False)
            )
            for tap in itertools.product(*map(range, kernel[:-1]))
        )
        array = _along_last_axis(x, width, kernel[-1], stride[-1], dilation[-1])
        return cls(array, taps, tuple(leading), stride[:-1])

    def split(self, columns: int) -> tuple[int, ...]:
        """Shape of the locations of an example, cut to products of the right size.

        Locations along the last two axes lie behind one another in memory unless a stride is
        between them. Then they are cut to pieces of one length, of as many as make a small product
        with a matrix of so many columns.
        """
        width, k = self.array.shape[-2:]
        if self.steps[-1] != 1:
            return (*self.leading, width)
        rows = self.leading[-1] * width
        least = -(-rows * k * columns // SMALL_PRODUCT)
        pieces = next((i for i in range(max(1, least), rows) if rows % i == 0), rows)
        if rows // pieces < 8:  # as for a prime number of locations
            pieces = 1
        return (*self.leading[:-1], pieces, rows // pieces)

    def views(self, split: tuple[int, ...]) -> Iterator[HostArray]:
        """For each tap its strips, shape (n, *split, K): nothing is copied."""
        shape = (self.array.shape[0], *split, self.array.shape[-1])
        for tap in self.taps:
            yield self.array[:, *tap].reshape(shape)


def product(
    x: HostArray,
    geometry: Geometry,
    m: HostArray,
    bias: HostArray | None,
    y: HostArray,
    budget_bytes: int,
) -> None:
    """Write patches times m, plus a bias, to y.

    Parameters
    ----------
    x : shape (N, *spatial, C)
        Already padded.
    geometry : Geometry
    m : shape (taps · C, d_out)
    bias : shape (d_out,), or None
    y : shape (N, *out, d_out)
    budget_bytes : int
        The most bytes of strips and products alive at once (one example at least).

    Examples
    --------
    >>> x, y = np.arange(6.0).reshape(1, 3, 2, 1), np.empty((1, 2, 1, 1))
    >>> geometry = Geometry((2, 2), (1, 1), (1, 1), ((0, 0), (0, 0)))
    >>> product(x, geometry, np.ones((4, 1)), np.ones(1), y, 1000)
    >>> y[0, :, 0, 0]
    array([ 7., 15.])
    """
    d_out = m.shape[1]
    factors = np.ascontiguousarray(m).reshape(math.prod(geometry.kernel[:-1]), -1, d_out)

    def write(examples: slice) -> None:
        strips = Strips.of(x[examples], geometry)
        split = strips.split(d_out)
        total, buffer = y[examples].reshape(len(strips.array), *split, d_out), None
        for i, view in enumerate(strips.views(split)):
            if i == 0:
                np.matmul(view, factors[i], out=total)
            else:
                buffer = np.matmul(view, factors[i], out=buffer)
                total += buffer
        if bias is not None:
            total += bias

    threads.each(write, _chunks(x, geometry, y, budget_bytes))


def gradient(
    x: HostArray,
    geometry: Geometry,
    g: HostArray,
    budget_bytes: int,
) -> HostArray:
    """Sum over examples and locations of g times the transposed patch.

    Parameters
    ----------
    x : shape (N, *spatial, C)
        Already padded.
    geometry : Geometry
    g : shape (N, *out, d_out)
    budget_bytes : int
        The most bytes of strips and products alive at once (one example at least).

    Returns
    -------
    shape (d_out, taps · C)

    Examples
    --------
    >>> x, g = np.arange(6.0).reshape(1, 3, 2, 1), np.ones((1, 2, 1, 1))
    >>> gradient(x, Geometry((2, 2), (1, 1), (1, 1), ((0, 0), (0, 0))), g, 1000)
    array([[2., 4., 6., 8.]])
    """
    d_out = g.shape[-1]
    total = np.zeros(
        (math.prod(geometry.kernel[:-1]), d_out, geometry.kernel[-1] * x.shape[-1]), dtype=g.dtype
    )

    def sums(examples: slice) -> HostArray:
        strips = Strips.of(x[examples], geometry)
        split = strips.split(d_out)
        transposed = g[examples].reshape(len(strips.array), *split, d_out).swapaxes(-1, -2)
        axes, part = tuple(range(len(split))), np.empty_like(total)
        for i, view in enumerate(strips.views(split)):
            np.matmul(transposed, view).sum(axis=axes, out=part[i])
        return part

    for part in threads.in_order(sums, _chunks(x, geometry, g, budget_bytes)):
        total += part
    return total.swapaxes(0, 1).reshape(d_out, -1)


def _chunks(x: HostArray, geometry: Geometry, y: HostArray, budget_bytes: int) -> Iterator[slice]:
    """Slices of examples whose strips, and twice whose outputs y, are within the budget."""
    n, each = x.shape[0], geometry.kernel[-1] * math.prod(x.shape[1:]) + 2 * math.prod(y.shape[1:])
    step = max(1, min(budget_bytes, CACHE_BYTES) // max(1, each * x.itemsize))
    return cut(n, step)


def _along_last_axis(x: HostArray, out: int, taps: int, stride: int, dilation: int) -> HostArray:
    """Unfold the last spatial axis: (n, *leading, W, C) to (n, *leading, out, taps · C)."""
    c = x.shape[-1]
    if taps == stride == 1:
        return np.ascontiguousarray(x)
    *others, width, last = x.strides
    split = (*x.shape[:-2], out, taps, c)
    strides = (*others, width * stride, width * dilation, last)
    view = np.lib.stride_tricks.as_strided(x, split, strides, writeable=False)
    # Where reshaping made no copy the rows still overlap: BLAS takes no such matrices.
    return np.ascontiguousarray(view.reshape(*split[:-2], taps * c))


def overlap(geometry: Geometry, out: tuple[int, ...]) -> bool:
    """Tell whether `second_moment` is defined, and saves anything: patches have rows in common.

    Examples
    --------
    >>> geometry = Geometry((3, 3), (1, 1), (1, 1), ((0, 0), (0, 0)))
    >>> overlap(geometry, (8, 8)), overlap(geometry, (2, 2))
    (True, False)
    """
    taps, step = geometry.kernel[0], geometry.dilation[0]
    return len(out) == 2 and geometry.stride[0] == 1 and taps > 1 and out[0] > (taps - 1) * step


def second_moment(
    x: HostArray, geometry: Geometry, budget_bytes: int
) -> tuple[HostArray, HostArray]:
    """Sum over examples and locations of a aᵀ, and of a, for patches a.

    Taps (i, ·) and (j, ·) of all locations together are strips r and r + (j - i), for rows r that
    begin at i and are as many as there are locations. What i and j have in common but for j - i,
    the rows in the middle, is multiplied once; rows at the border that not all i have come on top,
    each once. Of 5 × 5 taps and 16 × 16 locations that is 2.5 times fewer operations than the
    symmetric product of all patches, 3.2 times where rows of zeros at the border are left out.

    Parameters
    ----------
    x : shape (N, H, W, C)
        Already padded.
    geometry : Geometry
        Of two axes, with stride 1 along the first one (`overlap`).
    budget_bytes : int
        The most bytes of strips alive at once (one example at least).

    Returns
    -------
    moment : shape (d, d), d = taps · C
    sums : shape (d,)

    Examples
    --------
    >>> x = np.arange(6.0).reshape(1, 3, 2, 1)
    >>> geometry = Geometry((2, 1), (1, 1), (1, 1), ((0, 0), (0, 0)))
    >>> moment, sums = second_moment(x, geometry, 1000)
    >>> moment, sums
    (array([[14., 26.],
           [26., 54.]]), array([ 6., 14.]))
    """
    (taps, last), (step, spread), c = geometry.kernel, geometry.dilation, x.shape[-1]
    stride = geometry.stride[1]
    height, k = x.shape[1], last * c
    inner = height - (taps - 1) * step  # locations along the first axis
    width = (x.shape[2] - spread * (last - 1) - 1) // stride + 1
    blocks = [blocks_of_rows(inner, step, taps - 1 - distance) for distance in range(taps)]
    products = [np.zeros((len(each), k, k), dtype=x.dtype) for each in blocks]
    row_sums = np.zeros((height, k), dtype=x.dtype)

    def sums_over(examples: slice) -> tuple[list[HostArray], HostArray]:
        part = x[examples].swapaxes(0, 1)
        zero = [not row.any() for row in part]
        strips = _along_last_axis(part, width, last, stride, spread).reshape(height, -1, k)
        found = [
            _products(strips, each, distance * step, zero) for distance, each in enumerate(blocks)
        ]
        return found, np.ones(strips.shape[1], dtype=x.dtype) @ strips

    for found, rows in threads.in_order(sums_over, _chunks(x, geometry, x, budget_bytes)):
        row_sums += rows
        for total, part in zip(products, found, strict=True):
            total += part
    moment = np.empty((taps, k, taps, k), dtype=x.dtype)
    for distance, total in enumerate(products):
        for i in range(taps - distance):
            # The rows of tap i begin i blocks later than those of the first one, and end so.
            pair = total[i : i + taps - distance].sum(axis=0)
            moment[i, :, i + distance] = pair
            moment[i + distance, :, i] = pair.T
    sums = [row_sums[i * step : i * step + inner].sum(axis=0) for i in range(taps)]
    return moment.reshape(taps * k, taps * k), np.concatenate(sums)


def blocks_of_rows(inner: int, step: int, moves: int) -> list[tuple[int, int]]:
    """Rows cut so that any `inner` of them, beginning at 0 to `moves` steps, are whole blocks.

    Examples
    --------
    >>> blocks_of_rows(16, 1, 2)
    [(0, 1), (1, 2), (2, 16), (16, 17), (17, 18)]
    """
    before = [i * step for i in range(moves + 1)]
    return list(itertools.pairwise([*before, *(inner + i for i in before)]))


def _products(
    strips: HostArray, blocks: list[tuple[int, int]], shift: int, zero: list[bool]
) -> HostArray:
    """For each block, its strips times those `shift` rows further on."""
    k = strips.shape[-1]
    total = np.zeros((len(blocks), k, k), dtype=strips.dtype)
    for block, (start, stop) in enumerate(blocks):
        if not (all(zero[start:stop]) or all(zero[start + shift : stop + shift])):
            one, other = strips[start:stop], strips[start + shift : stop + shift]
            total[block] = _gram(one.reshape(-1, k), other.reshape(-1, k))
    return total


def _gram(a: HostArray, b: HostArray) -> HostArray:
    """aᵀ b for long matrices; narrow ones in pieces that make small products."""
    n, k = a.shape
    rows = SMALL_PRODUCT // k**2
    if rows < 4 * k or n < rows:
        return a.T @ b
    pieces = n // rows
    cut = pieces * rows
    one, other = (m[:cut].reshape(pieces, rows, k) for m in (a, b))
    return np.matmul(one.swapaxes(1, 2), other).sum(axis=0) + a[cut:].T @ b[cut:]
