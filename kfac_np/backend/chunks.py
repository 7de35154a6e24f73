"""Slices of examples, as many at a time as a budget of memory holds."""

from __future__ import annotations

from collections.abc import Iterator

from kfac_np.backend.array import Array, array_namespace

__all__ = ["cut", "examples_at_once"]


def cut(n: int, step: int) -> Iterator[slice]:
    """Cut 0..n-1 into slices of so many, the last one of what is left.

    Examples
    --------
    >>> [(part.start, part.stop) for part in cut(5, 2)]
    [(0, 2), (2, 4), (4, 5)]
    """
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def examples_at_once(x: Array, numbers: int, budget_bytes: int) -> int:
    """How many examples of so many numbers each, of the dtype of x, the budget holds; at least 1.

    Examples
    --------
    >>> import numpy as np
    >>> examples_at_once(np.zeros(1), 100, 4000), examples_at_once(np.zeros(1), 100, 4)
    (5, 1)
    """
    xp = array_namespace(x)
    info = xp.finfo if xp.isdtype(x.dtype, "real floating") else xp.iinfo
    item = info(x.dtype).bits // 8
    return max(1, budget_bytes // max(1, numbers * item))
