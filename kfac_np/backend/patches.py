"""What a convolution sees at each location: patches, unfolded a few examples at a time.

Arrays are laid out (N, *spatial, C), channels last: a patch is then a row whose channels lie side
by side, the affine map of a convolution is a matrix product on the last axis like that of a dense
layer, and nothing is ever transposed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import array_api_compat

from kfac_np.backend.array import Array, array_namespace
from kfac_np.backend.chunks import cut, examples_at_once
from kfac_np.backend.geometry import Geometry, pad
from kfac_np.backend.numpy_kernels.engine import NumpyEngine
from kfac_np.backend.torch_kernels import engine as torch_engine
from kfac_np.backend.unfolding import Unfolding, transposed_product_generic, unfold

__all__ = ["Patches", "patch_budget", "transposed_product"]


@final
@dataclass(frozen=True, eq=False)
class Patches:
    """The patches of an input, unfolded when and where they are asked for.

    Stands for the array of shape (N, T, d) without holding it: only the input is kept, padded once
    where that is asked for. What walks over `chunks` never has more than `budget_bytes` of patches
    alive (one example at least), and works on rows that are still in the processor's cache.

    Attributes
    ----------
    x : Array, shape (N, *spatial, C)
        The input, not padded yet.
    geometry : Geometry
    ones : bool
        Whether the homogeneous coordinate is appended.
    budget_bytes : int

    Examples
    --------
    >>> import numpy as np
    >>> patches = Patches(np.ones((5, 4, 1)), Geometry((2,), (1,), (1,), ((0, 0),)), True, 100)
    >>> patches.shape, [chunk.shape[0] for _, chunk in patches.chunks()]
    ((5, 3, 3), [1, 1, 1, 1, 1])
    """

    x: Array
    geometry: Geometry
    ones: bool
    budget_bytes: int

    @cached_property
    def out(self) -> tuple[int, ...]:
        """Number of locations along each spatial axis."""
        return self.geometry.output_size(self.x.shape[1:-1])

    @cached_property
    def padded(self) -> Array:
        """The padded input."""
        return pad(self.x, self.geometry.padding)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, T, d)."""
        d = self.geometry.taps * self.x.shape[-1] + self.ones
        return (self.x.shape[0], math.prod(self.out), d)

    @property
    def ndim(self) -> int:
        """3."""
        return 3

    def take(self, rows: slice) -> Patches:
        """The patches of some examples."""
        return Patches(self.x[rows, ...], self.geometry, self.ones, self.budget_bytes)

    def array(self) -> Array:
        """All of them at once, shape (N, T, d)."""
        return unfold(self.padded, self.geometry, self.ones)

    def chunks(self) -> Iterator[tuple[slice, Array]]:
        """Slices of examples and their unfolded rows (n, T, d), within the budget.

        Let go of the rows before asking for the next ones.
        """
        n, t, d = self.shape
        step = examples_at_once(self.x, t * d, self.budget_bytes)
        for rows in cut(n, step):
            yield rows, unfold(self.padded[rows, ...], self.geometry, self.ones)

    def product(self, m: Array) -> Array:
        """Patches times a matrix (d, d_out): the affine map of a convolution.

        Returns
        -------
        Array, shape (N, *out, d_out)
        """
        return self._engine.product(m)

    def gradient(self, g: Array) -> Array:
        """Sum over examples and locations of g āᵀ: the gradient of a convolution's matrix.

        Parameters
        ----------
        g : Array, shape ([K,] N, T, d_out)

        Returns
        -------
        Array, shape ([K,] d_out, d)
        """
        return self._engine.gradient(g)

    def second_moment(self) -> Array:
        """Sum over examples and locations of ā āᵀ, shape (d, d).

        Without weights, so that patches that overlap have products in common.
        """
        return self._engine.second_moment()

    @property
    def _engine(self) -> NumpyEngine | torch_engine.TorchEngine | Unfolding:
        if NumpyEngine.suits(self):
            return NumpyEngine(self)
        if torch_engine.suits(self.x, self.geometry):
            return torch_engine.TorchEngine(self)
        return Unfolding(self)


def patch_budget(x: Array) -> int:
    """Bytes of patches to unfold at once where the caller does not say.

    On a processor as much as stays in its cache: unfolding there costs next to nothing beside the
    product that follows. On a GPU so much that few kernels are launched.

    Examples
    --------
    >>> import numpy as np
    >>> patch_budget(np.zeros(1))
    8388608
    """
    return 2**30 if array_api_compat.is_cupy_array(x) else 2**23


def transposed_product(
    g: Array, w: Array, geometry: Geometry, size: tuple[int, ...], budget_bytes: int
) -> Array:
    """The adjoint of x ↦ patches(x) wᵀ: derivatives at the locations, carried to the pixels.

    Parameters
    ----------
    g : Array, shape (N, *out, c_out)
    w : Array, shape (c_out, taps · C)
    geometry : Geometry
    size : tuple of int
        Spatial size of the input.
    budget_bytes : int
        The most bytes of patches alive at once (one example at least).

    Returns
    -------
    Array, shape (N, *size, C)

    Examples
    --------
    >>> import numpy as np
    >>> geometry = Geometry((2,), (1,), (1,), ((1, 0),))
    >>> g, w = np.ones((1, 3, 1)), np.asarray([[1.0, 10.0]])
    >>> transposed_product(g, w, geometry, (3,), 1000)[0, :, 0]
    array([11., 11., 10.])
    """
    if torch_engine.suits(g, geometry):
        return torch_engine.transposed_product(g, w, geometry, size)
    if any(s != 1 for s in geometry.stride):
        return transposed_product_generic(g, w, geometry, size, budget_bytes)
    # Without strides this is a convolution, too: of g, by the kernel turned round. Unfolding g
    # and one product is faster than a product and folding, which adds slice by slice.
    xp = array_namespace(g, w)
    c_out, axes = g.shape[-1], len(size)
    padding = tuple(
        (e - 1 - low, e - 1 - high)
        for e, (low, high) in zip(geometry.extent, geometry.padding, strict=True)
    )
    kernel = xp.reshape(w, (c_out, *geometry.kernel, -1))
    kernel = xp.flip(kernel, axis=tuple(range(1, axes + 1)))
    kernel = xp.permute_dims(kernel, (*range(1, axes + 1), 0, axes + 1))
    turned = xp.reshape(kernel, (geometry.taps * c_out, -1))
    turned_geometry = replace(geometry, padding=padding)
    return Patches(g, turned_geometry, False, budget_bytes).product(turned)
