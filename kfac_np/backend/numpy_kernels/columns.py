"""Products with patches of few channels: each tap of all locations is a row, copied as it lies.

The rows of an image are moved in one piece then, and not pixel by pixel. For one channel that is
three times as fast as strips, whose products have as few columns as the kernel's last axis.

NumPy only; `kfac_np.backend.unfolding.Unfolding` computes the same by the standard alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from kfac_np.backend.chunks import cut, examples_at_once
from kfac_np.backend.numpy_kernels import threads

if TYPE_CHECKING:
    from kfac_np.backend.patches import Patches

__all__ = ["gradient", "product"]

CACHE_BYTES = 2**19
"""Of patches alive at once: what is in the cache of a core."""


def product(p: Patches, m: Any) -> Any:
    """`Patches.product`.

    Examples
    --------
    >>> from kfac_np.backend import Geometry, Patches
    >>> geometry = Geometry((2,), (1,), (1,), ((0, 0),))
    >>> p = Patches(np.arange(3.0).reshape(1, 3, 1), geometry, True, 99)
    >>> product(p, np.asarray([[1.0], [10.0], [100.0]]))[0, :, 0]
    array([110., 121.])
    """
    y = np.empty((p.shape[0], *p.out, m.shape[1]), dtype=p.x.dtype)

    def write(examples: slice) -> None:
        columns = _columns(p, examples)
        np.matmul(columns.T, m, out=y[examples].reshape(columns.shape[1], m.shape[1]))

    threads.each(write, _chunks(p))
    return y


def gradient(p: Patches, g: Any) -> Any:
    """`Patches.gradient`.

    Examples
    --------
    >>> from kfac_np.backend import Geometry, Patches
    >>> geometry = Geometry((2,), (1,), (1,), ((0, 0),))
    >>> p = Patches(np.arange(3.0).reshape(1, 3, 1), geometry, True, 99)
    >>> gradient(p, np.ones((1, 2, 1)))
    array([[1., 3., 2.]])
    """

    def sums(examples: slice) -> Any:
        columns = _columns(p, examples)
        rows = g[..., examples, :, :].reshape(*g.shape[:-3], columns.shape[1], g.shape[-1])
        return columns @ rows

    total = np.zeros((*g.shape[:-3], p.shape[2], g.shape[-1]), dtype=p.x.dtype)
    for part in threads.in_order(sums, _chunks(p)):
        total += part
    return np.ascontiguousarray(total.swapaxes(-1, -2))


def _columns(p: Patches, examples: slice) -> Any:
    """The patches of some examples as columns, shape (d, n · T)."""
    x: Any = p.padded
    x = np.moveaxis(x[examples], -1, 0)
    c, n = x.shape[:2]
    columns = np.empty((p.shape[2], n, *p.out), dtype=x.dtype)
    for tap, window in enumerate(p.geometry.windows(p.out)):
        columns[tap * c : (tap + 1) * c] = x[:, :, *window]
    if p.ones:
        columns[-1] = 1.0
    return columns.reshape(p.shape[2], -1)


def _chunks(p: Patches) -> Iterator[slice]:
    n, t, d = p.shape
    return cut(n, examples_at_once(p.x, t * d, min(p.budget_bytes, CACHE_BYTES)))
