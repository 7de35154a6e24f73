"""Checks that bad input meets before any state changes."""

from __future__ import annotations

import math
from typing import Any

import array_api_compat
import numpy as np

from kfac_np.backend.array import Array, array_namespace
from kfac_np.backend.reductions import are_finite
from kfac_np.backend.scalars import DeferredChecks
from kfac_np.errors import InputError

__all__ = [
    "all_finite",
    "require_array",
    "require_finite",
    "require_float",
    "require_indices",
    "require_same_place",
]


def all_finite(*arrays: Array) -> bool:
    """Tell whether every entry of every array is finite (one wait for the device).

    Examples
    --------
    >>> import numpy as np
    >>> all_finite(np.ones(3), np.asarray([np.nan]))
    False
    """
    return not arrays or bool(are_finite(*arrays))


def require_float(name: str, x: Any) -> None:
    """Raise `InputError` unless `x` is an array of real floating dtype.

    Examples
    --------
    >>> import numpy as np
    >>> require_float("x", np.ones(2, dtype=int))
    Traceback (most recent call last):
    kfac_np.errors.InputError: x: expected an array of floats, got dtype int64
    """
    require_array(name, x)
    xp = array_namespace(x)
    if x.dtype not in (xp.float32, xp.float64):
        wanted = "floats" if not xp.isdtype(x.dtype, "real floating") else "float32 or float64"
        raise InputError(f"{name}: expected an array of {wanted}, got dtype {x.dtype}")


def require_array(name: str, x: Any) -> None:
    """Raise `InputError` unless `x` is an array of a library that follows the standard.

    Examples
    --------
    >>> require_array("x", [1.0])
    Traceback (most recent call last):
    kfac_np.errors.InputError: x: expected an array, got list
    """
    if not array_api_compat.is_array_api_obj(x):
        raise InputError(f"{name}: expected an array, got {type(x).__name__}")
    if isinstance(x, np.ma.MaskedArray):
        raise InputError(
            f"{name}: expected an array without a mask, got {type(x).__name__}; give weights of 0 "
            "to examples that do not count"
        )


def require_finite(name: str, x: Array, checks: DeferredChecks | None = None) -> None:
    """Raise `InputError` if `x` has NaN or Inf: here, or when `checks` are read.

    Examples
    --------
    >>> import numpy as np
    >>> require_finite("x", np.asarray([1.0, np.inf]))
    Traceback (most recent call last):
    kfac_np.errors.InputError: x: expected finite values, got 1 of 2 that are NaN or Inf
    """

    def error() -> InputError:
        xp = array_namespace(x)
        bad = int(xp.sum(xp.astype(~xp.isfinite(x), xp.int64)))
        return InputError(
            f"{name}: expected finite values, got {bad} of {math.prod(x.shape)} that are NaN or Inf"
        )

    own = DeferredChecks() if checks is None else checks
    own.require(are_finite(x), error)
    if checks is None:
        own.wait()


def require_indices(
    what: str, x: Array, size: int, checks: DeferredChecks, error: type[InputError] = InputError
) -> None:
    """Raise `error` unless all integers of `x` are 0..size-1: here, or when `checks` are read.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([0, -1]).astype(np.uint64)
    >>> require_indices("x: expected words", x, 9, DeferredChecks())
    Traceback (most recent call last):
    kfac_np.errors.InputError: x: expected words 0..8, got -1..0 (uint64 as int64)
    """
    xp = array_namespace(x)
    # As they will be used to count with: what is beyond int64 is negative then. The size may be
    # beyond what the integers' own type holds.
    signed = xp.astype(x, xp.int64, copy=False)
    low, high = xp.min(signed), xp.max(signed)

    def out_of_range() -> InputError:
        note = " (uint64 as int64)" if "uint64" in str(x.dtype) else ""
        return error(f"{what} 0..{size - 1}, got {int(low)}..{int(high)}{note}")

    checks.require((low >= 0) & (high < size), out_of_range)


def require_same_place(name: str, x: Array, like: Array, like_name: str = "parameters") -> None:
    """Raise `InputError` unless `x` and `like` share library, device and (if floating) dtype.

    Data are never moved or cast behind the caller's back.

    Examples
    --------
    >>> import numpy as np
    >>> require_same_place("x", np.ones(2), np.ones(2, dtype=np.float32))
    Traceback (most recent call last):
    kfac_np.errors.InputError: x: expected dtype float32 as the parameters have, got float64; ...
    """
    require_array(name, x)
    xp, other = array_namespace(x), array_namespace(like)
    if xp is not other:
        raise InputError(
            f"{name}: expected an array of {other.__name__} as the {like_name} are, "
            f"got {xp.__name__}"
        )
    if x.device != like.device:
        raise InputError(
            f"{name}: expected device {like.device} as the {like_name} have, got {x.device}"
        )
    if x.dtype != like.dtype and xp.isdtype(x.dtype, "real floating"):
        raise InputError(
            f"{name}: expected dtype {like.dtype} as the {like_name} have, got {x.dtype}; "
            "backend.asarray gives floats the backend's dtype"
        )
