"""Give an example's numbers another shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, Backend, Rng, array_namespace
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers.base import Layer
from kfac_np.trees import Tree
from kfac_np.validation import is_integer, plain_fields

__all__ = ["Reshape"]


@final
@dataclass(frozen=True)
class Reshape(Layer):
    """(N, ...) to (N, *shape), row-major.

    Parameters
    ----------
    shape : tuple of int
        Shape of one example. One entry may be -1: what is left over.

    Examples
    --------
    >>> import numpy as np
    >>> Reshape((2, -1)).forward((), np.ones((5, 3, 4)))[0].shape
    (5, 2, 6)
    >>> Reshape((2, -1)).output_shape((3, 3))
    Traceback (most recent call last):
    kfac_np.errors.ShapeError: Reshape((2, -1)): expected a multiple of 2 numbers, got (N, 3, 3)
    """

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        plain_fields(self)
        shape = self.shape
        good = isinstance(shape, tuple) and all(is_integer(n) and (n > 0 or n == -1) for n in shape)
        if not good or not shape or shape.count(-1) > 1:
            raise InputError(
                f"Reshape: expected a tuple of positive integers, one of them -1 at most, "
                f"got {shape!r}"
            )

    def __repr__(self) -> str:
        return f"Reshape({self.shape})"

    def init(self, rng: Rng, backend: Backend) -> Tree:
        return ()

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        numbers = math.prod(shape)
        known = math.prod(n for n in self.shape if n != -1)
        free = -1 in self.shape
        if numbers % known or (not free and numbers != known):
            expected = f"a multiple of {known} numbers" if free else f"{known} numbers"
            came = ", ".join(map(str, ("N", *shape)))
            raise ShapeError(f"{self!r}: expected {expected}, got ({came})")
        return tuple(numbers // known if n == -1 else n for n in self.shape)

    def forward(self, params: Tree, x: Array) -> tuple[Array, Tree]:
        shape = x.shape[1:]
        out = self.output_shape(shape)
        return array_namespace(x).reshape(x, (x.shape[0], *out)), shape

    def backward(
        self, params: Tree, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        if not wrt_input:
            return None, ()
        lead = g.shape[: g.ndim - len(self.shape)]  # ([K,] N)
        return array_namespace(g).reshape(g, (*lead, *cache)), ()

    def jvp(self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree) -> Array | None:
        return None if dx is None else self.forward((), dx)[0]

    def backward_jvp(
        self,
        params: Tree,
        cache: Tree,
        g: Array,
        dx: Array | None,
        dparams: Tree,
        dg: Array | None,
    ) -> tuple[Array | None, Tree]:
        return (None, ()) if dg is None else self.backward(params, cache, dg)

    def take(self, cache: Tree, rows: slice) -> Tree:
        return cache  # the shape of one example

    def backward_size(self, shape: tuple[int, ...]) -> int:
        return 0  # a view of what the layer above keeps
