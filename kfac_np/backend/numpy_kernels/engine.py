"""Products with patches of NumPy's arrays: which kernel is the fastest for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import array_api_compat
import numpy as np

from kfac_np.backend.chunks import cut
from kfac_np.backend.numpy_kernels import columns, lags, strips, threads, winograd
from kfac_np.backend.unfolding import Unfolding

if TYPE_CHECKING:
    from kfac_np.backend.patches import Patches

__all__ = ["NumpyEngine"]

FEWEST_LOCATIONS = 8
"""Of an example. With fewer, unfolding and one product are faster than a product for each strip."""
MOST_CHANNELS = 3
"""For which products with patches as columns are faster than with strips."""


@final
@dataclass(frozen=True, eq=False)
class NumpyEngine:
    """`Patches.product`, `gradient` and `second_moment` by columns, strips, Winograd and lags.

    Examples
    --------
    >>> from kfac_np.backend import Geometry, Patches
    >>> patches = Patches(np.ones((5, 9, 1)), Geometry((2,), (1,), (1,), ((0, 0),)), True, 100)
    >>> NumpyEngine.suits(patches), NumpyEngine(patches).product(np.ones((3, 1))).shape
    (True, (5, 8, 1))
    """

    patches: Patches

    @staticmethod
    def suits(patches: Patches) -> bool:
        """Tell whether these kernels are faster than unfolding."""
        return array_api_compat.is_numpy_array(patches.x) and patches.shape[1] >= FEWEST_LOCATIONS

    def product(self, m: Any) -> Any:
        """`Patches.product`."""
        p = self.patches
        if p.x.shape[-1] <= MOST_CHANNELS:
            return columns.product(p, m)
        x: Any = p.padded
        y = np.empty((x.shape[0], *p.out, m.shape[1]), dtype=x.dtype)
        bias = m[-1, :] if p.ones else None
        kernels = self._kernels(m.shape[1])
        kernels.product(x, p.geometry, m[: p.shape[2] - p.ones, :], bias, y, p.budget_bytes)
        return y

    def gradient(self, g: Any) -> Any:
        """`Patches.gradient`."""
        p = self.patches
        if p.x.shape[-1] <= MOST_CHANNELS:
            return columns.gradient(p, g)
        x: Any = p.padded
        each = g if g.ndim == 4 else g[None, ...]
        total = np.zeros((len(each), g.shape[-1], p.shape[2]), dtype=x.dtype)
        kernels = self._kernels(g.shape[-1])
        for v, sums in zip(each, total, strict=True):
            locations = v.reshape(x.shape[0], *p.out, g.shape[-1])
            taps = p.shape[2] - p.ones
            sums[:, :taps] = kernels.gradient(x, p.geometry, locations, p.budget_bytes)
            if p.ones:
                for part in threads.in_order(_sum_of_rows, _pieces(v.reshape(-1, v.shape[-1]))):
                    sums[:, -1] += part
        return total.reshape(*g.shape[:-3], *total.shape[1:])

    def second_moment(self) -> Any:
        """`Patches.second_moment`."""
        p = self.patches
        if not strips.overlap(p.geometry, p.out):
            return Unfolding(p).second_moment()
        x: Any = p.padded
        kernels: Any = lags if lags.pays(x, p.geometry, p.out) else strips
        moment, sums = kernels.second_moment(x, p.geometry, p.budget_bytes)
        if not p.ones:
            return moment
        d = p.shape[2]
        total = np.empty((d, d), dtype=moment.dtype)
        total[:-1, :-1] = moment
        total[:-1, -1] = total[-1, :-1] = sums
        total[-1, -1] = p.shape[0] * p.shape[1]
        return total

    def _kernels(self, d_out: int) -> Any:
        """What multiplies: a module with `product` and `gradient`."""
        x: Any = self.patches.padded
        return winograd if winograd.pays(x, self.patches.geometry, d_out) else strips


def _pieces(rows: Any) -> list[Any]:
    """Rows cut to what stays in the cache of a core."""
    step = max(1, threads.PIECE_BYTES // max(1, rows.itemsize * rows.shape[1]))
    return [rows[part] for part in cut(len(rows), step)]


def _sum_of_rows(rows: Any) -> Any:
    return np.ones(len(rows), dtype=rows.dtype) @ rows
