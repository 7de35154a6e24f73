"""Reductions of many arrays to one number: with CuPy a pass over each, and one over the results."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import array_api_compat

from kfac_np.backend.array import Array, array_namespace

__all__ = ["are_finite", "are_finite_generic", "inner", "inner_generic", "sum_of_squares"]


def are_finite(*arrays: Array) -> Array:
    """Whether all entries of all arrays are finite (0-d array); there is at least one array.

    Examples
    --------
    >>> import numpy as np
    >>> bool(are_finite(np.ones(2), np.asarray([1.0, np.inf])))
    False
    """
    if all(array_api_compat.is_cupy_array(x) and x.dtype.kind == "f" for x in arrays):
        return _reduced(_FINITE, bool, [(x,) for x in arrays])
    xp = array_namespace(*arrays)
    # A sum of squares hides no NaN and no Inf; where it overflows the entries are looked at.
    if array_api_compat.is_numpy_namespace(xp):
        if all(math.isfinite(xp.vdot(x, x)) for x in arrays):
            return xp.asarray(True)
    elif array_api_compat.is_torch_namespace(xp) and all(map(xp.is_floating_point, arrays)):
        total = inner(arrays, arrays)
        if math.isfinite(total):
            return xp.ones_like(total, dtype=xp.bool)
    return are_finite_generic(*arrays)


def are_finite_generic(*arrays: Array) -> Array:
    """`are_finite`, by the standard alone.

    Examples
    --------
    >>> import numpy as np
    >>> bool(are_finite_generic(np.ones((2, 2))))
    True
    """
    xp = array_namespace(*arrays)
    return xp.all(xp.stack([xp.all(xp.isfinite(x)) for x in arrays]))


def inner(x: Sequence[Array], y: Sequence[Array]) -> Array:
    """Sum over all entries of all products x_i · y_i (0-d array).

    Parameters
    ----------
    x, y : sequence of Array
        As many, at least one, and of the same shapes and dtype.

    Examples
    --------
    >>> import numpy as np
    >>> float(inner([np.ones(3), np.ones((1, 2))], [np.ones(3), np.full((1, 2), 2.0)]))
    7.0
    """
    if array_api_compat.is_cupy_array(x[0]):
        return _reduced(_INNER, x[0].dtype, list(zip(x, y, strict=True)))
    xp = array_namespace(*x, *y)
    if array_api_compat.is_numpy_namespace(xp):
        return sum(map(xp.vdot, x[1:], y[1:]), start=xp.vdot(x[0], y[0]))
    if array_api_compat.is_torch_namespace(xp):
        products = [xp.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(x, y, strict=True)]  # type: ignore[attr-defined]
        return products[0] if len(products) == 1 else xp.sum(xp.stack(products))
    return inner_generic(x, y)


def inner_generic(x: Sequence[Array], y: Sequence[Array]) -> Array:
    """`inner`, by the standard alone.

    Examples
    --------
    >>> import numpy as np
    >>> float(inner_generic([np.ones(3)], [np.ones(3)]))
    3.0
    """
    xp = array_namespace(*x, *y)
    flat = [(xp.reshape(a, (-1,)), xp.reshape(b, (-1,))) for a, b in zip(x, y, strict=True)]
    total: Array = sum((xp.vecdot(a, b) for a, b in flat[1:]), start=xp.vecdot(*flat[0]))
    return total


def sum_of_squares(arrays: Sequence[Array]) -> Array:
    """Sum of the squares of all entries (0-d array, float64), of numbers up to 1e19 and beyond.

    Squares of single precision overflow there. On NumPy they are summed in the arrays' own
    precision first, which needs no copies, and again in double precision if that overflows.

    Examples
    --------
    >>> import numpy as np
    >>> float(sum_of_squares([np.full(4, 1e25, dtype=np.float32)])) / 4e50
    1.0
    """
    if array_api_compat.is_cupy_array(arrays[0]):
        return _reduced(_SQUARES, "float64", [(x,) for x in arrays])
    xp = array_namespace(*arrays)
    if array_api_compat.is_numpy_namespace(xp):
        total = inner(arrays, arrays)
        if math.isfinite(total) or not all(math.isfinite(xp.max(xp.abs(x))) for x in arrays):
            return xp.float64(total)
    wide = [xp.astype(x, xp.float64, copy=False) for x in arrays]
    return inner(wide, wide)


def _reduced(reduction: tuple[str, ...], dtype: Any, operands: Sequence[tuple[Any, ...]]) -> Any:
    """One pass over each tuple of operands, and one over what came out of them."""
    import cupy

    kernel = _reduction(*reduction)
    if len(operands) == 1:
        return kernel(*operands[0])
    with operands[0][0].device:
        each = cupy.empty(len(operands), dtype=dtype)
    for i, some in enumerate(operands):
        kernel(*some, each[i])
    return cupy.all(each) if dtype is bool else cupy.sum(each)


# Of CuPy's `ReductionKernel`: inputs, output, what is reduced, how, with which neutral element.
_FINITE = ("T x", "bool y", "isfinite(x)", "a && b", "y = a", "true", "kfac_np_are_finite")
_SQUARES = ("T x", "float64 z", "(double)x * (double)x", "a + b", "z = a", "0", "kfac_np_squares")
_INNER = ("T x, T y", "T z", "x * y", "a + b", "z = a", "0", "kfac_np_inner")


@functools.cache
def _reduction(*definition: str) -> Any:
    import cupy

    return cupy.ReductionKernel(*definition)
