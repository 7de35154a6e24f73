"""Flatten an example's axes into one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, Backend, Rng, array_namespace
from kfac_np.layers.base import Layer
from kfac_np.trees import Tree

__all__ = ["Flatten"]


@final
@dataclass(frozen=True)
class Flatten(Layer):
    """(N, ...) to (N, d), row-major.

    Examples
    --------
    >>> import numpy as np
    >>> Flatten().forward((), np.ones((2, 3, 4)))[0].shape
    (2, 12)
    """

    def init(self, rng: Rng, backend: Backend) -> Tree:
        return ()

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (math.prod(shape),)

    def forward(self, params: Tree, x: Array) -> tuple[Array, Tree]:
        shape = x.shape[1:]
        return array_namespace(x).reshape(x, (x.shape[0], math.prod(shape))), shape

    def backward(
        self, params: Tree, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        if not wrt_input:
            return None, ()
        return array_namespace(g).reshape(g, (*g.shape[:-1], *cache)), ()

    def jvp(self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree) -> Array | None:
        if dx is None:
            return None
        return array_namespace(dx).reshape(dx, (dx.shape[0], math.prod(cache)))

    def backward_jvp(
        self,
        params: Tree,
        cache: Tree,
        g: Array,
        dx: Array | None,
        dparams: Tree,
        dg: Array | None,
    ) -> tuple[Array | None, Tree]:
        if dg is None:
            return None, ()
        return self.backward(params, cache, dg)

    def take(self, cache: Tree, rows: slice) -> Tree:
        return cache  # the shape of one example

    def backward_size(self, shape: tuple[int, ...]) -> int:
        return 0  # a view of what the layer above keeps
