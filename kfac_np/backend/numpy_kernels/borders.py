"""Borders around NumPy's arrays, some examples at a time on several threads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kfac_np.backend.chunks import cut, examples_at_once
from kfac_np.backend.numpy_kernels import threads

__all__ = ["put_on"]


def put_on(
    x: Any,
    shape: tuple[int, ...],
    inner: tuple[slice, ...],
    outer: tuple[slice, ...],
    value: float,
) -> Any:
    """An array of `value` that has x[:, *outer] at [:, *inner].

    Examples
    --------
    >>> put_on(np.ones((1, 2, 1)), (1, 3, 1), (slice(1, 3),), (slice(0, 2),), 0.0)[0, :, 0]
    array([0., 1., 1.])
    """
    out = np.empty(shape, dtype=x.dtype)

    def write(examples: slice) -> None:
        out[examples] = value
        out[examples, *inner, :] = x[examples, *outer, :]  # over what is in the cache still

    step = examples_at_once(x, math.prod(shape[1:]), threads.PIECE_BYTES)
    threads.each(write, cut(shape[0], step))
    return out
