"""Products with patches on a processor, without unfolding them: strips of a kernel's last axis.

A patch of a 5 × 5 kernel is five strips, one for each row of the kernel, and neighbouring locations
above one another share four of them. Unfolding the last axis alone makes every strip once. The
product with a kernel is then the sum of products of five views of the same strips, moved by a row
each, and what was 25 copies of the input is 5.

NumPy only; `kfac_np.backend.patches` says what each function computes and has a twin by the
standard alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import numpy as np

__all__ = ["Strips", "gradient", "product"]

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
    >>> strips = Strips.of(np.arange(6.0).reshape(1, 3, 2, 1), (2, 2), (1, 1), (1, 1))
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
    def of(
        cls,
        x: HostArray,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        dilation: tuple[int, ...],
    ) -> Strips:
        """Strips of padded examples (n, *spatial, C)."""
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
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
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
    kernel, stride, dilation : tuple of int
    m : shape (taps · C, d_out)
    bias : shape (d_out,), or None
    y : shape (N, T, d_out)
    budget_bytes : int
        The most bytes of strips and products alive at once (one example at least).

    Examples
    --------
    >>> x, y = np.arange(6.0).reshape(1, 3, 2, 1), np.empty((1, 2, 1))
    >>> product(x, (2, 2), (1, 1), (1, 1), np.ones((4, 1)), np.ones(1), y, 1000)
    >>> y[0, :, 0]
    array([ 7., 15.])
    """
    d_out = m.shape[1]
    for examples in _chunks(x, kernel, y, budget_bytes):
        strips = Strips.of(x[examples], kernel, stride, dilation)
        m = np.ascontiguousarray(m).reshape(len(strips.taps), -1, d_out)
        split = strips.split(d_out)
        total, buffer = y[examples].reshape(len(strips.array), *split, d_out), None
        for i, view in enumerate(strips.views(split)):
            if i == 0:
                np.matmul(view, m[i], out=total)
            else:
                buffer = np.matmul(view, m[i], out=buffer)
                total += buffer
        if bias is not None:
            total += bias
        del strips, view, buffer  # before the next ones are made


def gradient(
    x: HostArray,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    g: HostArray,
    budget_bytes: int,
) -> HostArray:
    """Sum over examples and locations of g times the transposed patch.

    Parameters
    ----------
    x : shape (N, *spatial, C)
        Already padded.
    kernel, stride, dilation : tuple of int
    g : shape (N, T, d_out)
    budget_bytes : int
        The most bytes of strips and products alive at once (one example at least).

    Returns
    -------
    shape (d_out, taps · C)

    Examples
    --------
    >>> x, g = np.arange(6.0).reshape(1, 3, 2, 1), np.ones((1, 2, 1))
    >>> gradient(x, (2, 2), (1, 1), (1, 1), g, 1000)
    array([[2., 4., 6., 8.]])
    """
    d_out = g.shape[-1]
    total = np.zeros((d_out, math.prod(kernel[:-1]), kernel[-1] * x.shape[-1]), dtype=g.dtype)
    for examples in _chunks(x, kernel, g, budget_bytes):
        strips = Strips.of(x[examples], kernel, stride, dilation)
        split = strips.split(d_out)
        transposed = g[examples].reshape(len(strips.array), *split, d_out).swapaxes(-1, -2)
        for i, view in enumerate(strips.views(split)):
            total[:, i] += np.matmul(transposed, view).sum(axis=tuple(range(len(split))))
        del strips, view  # before the next ones are made
    return total.reshape(d_out, -1)


def _chunks(
    x: HostArray, kernel: tuple[int, ...], y: HostArray, budget_bytes: int
) -> Iterator[slice]:
    """Slices of examples whose strips, and twice whose outputs y, are within the budget."""
    n, each = x.shape[0], kernel[-1] * math.prod(x.shape[1:]) + 2 * math.prod(y.shape[1:])
    step = max(1, min(budget_bytes, CACHE_BYTES) // max(1, each * x.itemsize))
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


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
