"""Convolutions with fewer multiplications along the last axis: the algorithm of Cook and Toom.

m outputs of a kernel of k taps are the product of two polynomials, and its values at m + k - 1
points determine it: y = A [(G w) ⊙ (B x)], with matrices A, G, B of small rational numbers. For
m = 4 and k = 5 that is 8 multiplications instead of 20. In more dimensions this goes for the
last axis alone, and the others are summed over their taps. (Both axes at once would take fewer
multiplications still, and square what rounding errors are multiplied with.)

In single precision errors are 1.5 times those of unfolding and one matrix product.

NumPy only; `kfac_np.backend.unfolding.Unfolding` computes the same by the standard alone.

References
----------
Winograd 1980, Arithmetic Complexity of Computations; Lavin & Gray 2016, arXiv:1509.09308, §4.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from kfac_np.backend.chunks import cut
from kfac_np.backend.geometry import Geometry
from kfac_np.backend.numpy_kernels import threads
from kfac_np.backend.numpy_kernels.strips import CACHE_BYTES

__all__ = ["gradient", "pays", "product", "transforms"]

HostArray = np.ndarray[Any, Any]

OUTPUTS = 4
"""m: more outputs at once take fewer multiplications and lose digits."""

POINTS = (0, 1, -1, 2, -2, Fraction(1, 2), Fraction(-1, 2))
"""Where polynomials are evaluated, besides at infinity: of small numbers few digits are lost."""

LARGEST_SHARE = 0.7
"""Of the multiplications of a plain product: where these are more, they do not pay."""


@functools.cache
def transforms(taps: int) -> tuple[HostArray, HostArray, HostArray]:
    """A (m, q), G (q, taps) and B (q, q) with q = m + taps - 1: correlation = A [(G w) ⊙ (B x)].

    Examples
    --------
    >>> a, g, b = transforms(3)
    >>> x, w = np.arange(6.0) ** 2, np.asarray([1.0, 10.0, 100.0])
    >>> np.round(a @ ((g @ w) * (b @ x)), 9), np.correlate(x, w, "valid")
    (array([ 410.,  941., 1694., 2669.]), array([ 410.,  941., 1694., 2669.]))
    """
    q = OUTPUTS + taps - 1
    points = [Fraction(p) for p in POINTS[: q - 1]]
    values = _values(points, q)
    b = _inverse(values)
    g, a = _values(points, taps), _values(points, OUTPUTS)
    for i in range(q):
        column = [row[i] for row in b]
        size = max(abs(v) for v in column)  # moved to the kernel, whose transform is made once
        for row in b:
            row[i] /= size
        g[i] = [size * v for v in g[i]]
    return np.asarray(a, dtype=float).T, np.asarray(g, dtype=float), np.asarray(b, dtype=float).T


def _values(points: list[Fraction], size: int) -> list[list[Fraction]]:
    """The matrix that evaluates a polynomial of so many coefficients; infinity comes last."""
    infinity = [Fraction(0)] * (size - 1) + [Fraction(1)]
    return [*([p**j for j in range(size)] for p in points), infinity]


def _inverse(matrix: list[list[Fraction]]) -> list[list[Fraction]]:
    """Gauss and Jordan, in fractions."""
    n = len(matrix)
    rows = [[*row, *(Fraction(int(i == j)) for j in range(n))] for i, row in enumerate(matrix)]
    for c in range(n):
        pivot = next(i for i in range(c, n) if rows[i][c])
        rows[c], rows[pivot] = rows[pivot], rows[c]
        rows[c] = [v / rows[c][c] for v in rows[c]]
        for i in range(n):
            if i != c:
                rows[i] = [v - rows[i][c] * w for v, w in zip(rows[i], rows[c], strict=True)]
    return [row[n:] for row in rows]


@functools.lru_cache(maxsize=64)
def _whole_axis(taps: int, width: int, out: int, dtype: Any) -> tuple[HostArray, HostArray]:
    """B for all tiles of an axis, (tiles · q, width), and A, (out, tiles · q); beyond lie zeros."""
    a, _, b = transforms(taps)
    q, tiles = len(b), -(-out // OUTPUTS)
    into = np.zeros((tiles * q, tiles * OUTPUTS + taps - 1))
    back = np.zeros((tiles * OUTPUTS, tiles * q))
    for i in range(tiles):
        into[i * q : (i + 1) * q, i * OUTPUTS : i * OUTPUTS + q] = b
        back[i * OUTPUTS : (i + 1) * OUTPUTS, i * q : (i + 1) * q] = a
    return into[:, :width].astype(dtype), back[:out].astype(dtype)


def pays(x: HostArray, geometry: Geometry, d_out: int) -> bool:
    """Whether there are so many channels that the transforms are worth it.

    Examples
    --------
    >>> x = np.empty((1, 20, 20, 32))
    >>> geometry = Geometry((5, 5), (1, 1), (1, 1), ((0, 0), (0, 0)))
    >>> [pays(x[..., :c], geometry, 32) for c in (3, 32)]
    [False, True]
    """
    kernel, stride, dilation = geometry.kernel, geometry.stride, geometry.dilation
    if len(kernel) == 1 or not 3 <= kernel[-1] <= 5 or set(stride) | {dilation[-1]} != {1}:
        return False
    if x.dtype not in (np.float32, np.float64):
        return False
    *lead, width, c = x.shape[1:]
    out = [n - d * (k - 1) for n, k, d in zip(x.shape[1:-1], kernel, dilation, strict=True)]
    q = OUTPUTS + kernel[-1] - 1
    points = -(-out[-1] // OUTPUTS) * q  # of a row
    plain = math.prod(kernel) * math.prod(out) * c * d_out
    products = math.prod(kernel[:-1]) * math.prod(out[:-1]) * points * c * d_out
    moves = points * (math.prod(lead) * width * c + math.prod(out) * d_out)
    return products + moves <= LARGEST_SHARE * plain


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
        Already padded; two spatial axes or more.
    geometry : Geometry
        `pays` says of which kind.
    m : shape (taps · C, d_out)
    bias : shape (d_out,), or None
    y : shape (N, *out, d_out)
    budget_bytes : int
        The most bytes of transformed arrays alive at once (one example at least).

    Examples
    --------
    >>> x, y = np.arange(12.0).reshape(1, 2, 6, 1), np.empty((1, 2, 4, 1))
    >>> geometry = Geometry((1, 3), (1, 1), (1, 1), ((0, 0), (0, 0)))
    >>> product(x, geometry, np.ones((3, 1)), np.zeros(1), y, 1000)
    >>> np.round(y[0, ..., 0], 9)
    array([[ 3.,  6.,  9., 12.],
           [21., 24., 27., 30.]])
    """
    c, d_out, taps = x.shape[-1], m.shape[1], geometry.kernel[-1]
    into, back = _whole_axis(taps, x.shape[-2], y.shape[-2], x.dtype)
    g = transforms(taps)[1].astype(x.dtype)
    q = len(g)
    # (leading taps, q, C, d_out)
    factors = np.matmul(g, m.reshape(-1, taps, c * d_out)).reshape(-1, q, c, d_out)

    def write(examples: slice) -> None:
        points = np.matmul(into, x[examples])
        products: Any = None
        buffer: Any = None
        views = _views(points, geometry.kernel, geometry.dilation, q)
        for factor, view in zip(factors, views, strict=True):
            if products is None:
                products = np.matmul(view, factor)
            else:
                buffer = np.matmul(view, factor, out=buffer)
                products += buffer
        rows = _from_points(products, y[examples].shape, q)
        np.matmul(back, rows, out=y[examples])
        if bias is not None:
            y[examples] += bias

    threads.each(write, _chunks(x, y, into, budget_bytes))


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
        Already padded; two spatial axes or more.
    geometry : Geometry
        `pays` says of which kind.
    g : shape (N, *out, d_out)
    budget_bytes : int
        The most bytes of transformed arrays alive at once (one example at least).

    Returns
    -------
    shape (d_out, taps · C)

    Examples
    --------
    >>> x, g = np.arange(12.0).reshape(1, 2, 6, 1), np.ones((1, 2, 4, 1))
    >>> geometry = Geometry((1, 3), (1, 1), (1, 1), ((0, 0), (0, 0)))
    >>> np.round(gradient(x, geometry, g, 1000), 9)
    array([[36., 44., 52.]])
    """
    kernel, dilation = geometry.kernel, geometry.dilation
    c, d_out, taps = x.shape[-1], g.shape[-1], kernel[-1]
    into, back = _whole_axis(taps, x.shape[-2], g.shape[-2], x.dtype)
    kernels = transforms(taps)[1].astype(x.dtype)
    q = len(kernels)
    total = np.zeros((math.prod(kernel[:-1]), q, c, d_out), dtype=x.dtype)

    def sums(examples: slice) -> HostArray:
        points = np.matmul(into, x[examples])
        factor = next(_views(np.matmul(back.T, g[examples]), (1,) * len(kernel), dilation, q))
        part = np.empty_like(total)
        for i, view in enumerate(_views(points, kernel, dilation, q)):
            products = np.matmul(view.swapaxes(-1, -2), factor)
            products.sum(axis=tuple(range(products.ndim - 3)), out=part[i])
        return part

    for part in threads.in_order(sums, _chunks(x, g, into, budget_bytes)):
        total += part
    w = np.matmul(kernels.T, total.reshape(-1, q, c * d_out))
    return w.reshape(-1, d_out).T


def _views(
    points: HostArray, kernel: tuple[int, ...], dilation: tuple[int, ...], q: int
) -> Iterator[HostArray]:
    """For each tap of the leading axes what it sees, shape (n, *leading but one, q, rows, C).

    `points` has shape (n, *leading, tiles · q, C); nothing is copied.
    """
    n, *lead, columns, c = points.shape
    split = points.reshape(n, *lead, columns // q, q, c)
    out = [size - d * (k - 1) for size, k, d in zip(lead, kernel[:-1], dilation[:-1], strict=True)]
    for tap in itertools.product(*map(range, kernel[:-1])):
        window = tuple(
            slice(i * d, i * d + size) for i, d, size in zip(tap, dilation, out, strict=False)
        )
        rows = split[:, *window].reshape(n, *out[:-1], out[-1] * (columns // q), q, c)
        yield rows.swapaxes(-2, -3)


def _from_points(products: HostArray, shape: tuple[int, ...], q: int) -> HostArray:
    """(n, *leading but one, q, rows, d_out) to (n, *leading, tiles · q, d_out)."""
    rows = np.ascontiguousarray(products.swapaxes(-2, -3))
    return rows.reshape(*shape[:-2], -1, shape[-1])


def _chunks(x: HostArray, y: HostArray, into: HostArray, budget_bytes: int) -> Iterator[slice]:
    """Slices of examples whose transforms are within the budget."""
    points = len(into) * (
        math.prod(x.shape[1:-2]) * x.shape[-1] + 3 * math.prod(y.shape[1:-2]) * y.shape[-1]
    )
    step = max(1, min(budget_bytes, CACHE_BYTES) // (points * x.itemsize))
    return cut(x.shape[0], step)
