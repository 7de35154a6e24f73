"""Give an example's numbers another shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, Rng, array_namespace
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers.base import Parameterless
from kfac_np.trees import Tree
from kfac_np.validation import is_integer, plain_fields

__all__ = ["Flatten", "Reshape"]


class _OtherShape(Parameterless):
    """(N, ...) to (N, *output_shape), row-major; the cache is the shape of one example."""

    def forward(self, params: Tree, x: Array, rng: Rng | None = None) -> tuple[Array, Tree]:
        return self._tangent((), x), x.shape[1:]

    def take(self, cache: Tree, rows: slice) -> Tree:
        return cache

    def backward_size(self, shape: tuple[int, ...]) -> int:
        return 0  # a view of what the layer above keeps

    def _tangent(self, cache: Tree, dx: Array) -> Array:
        return array_namespace(dx).reshape(dx, (dx.shape[0], *self.output_shape(dx.shape[1:])))

    def _transpose(self, cache: Tree, g: Array) -> Array:
        lead = g.shape[: g.ndim - len(self.output_shape(cache))]  # ([K,] N)
        return array_namespace(g).reshape(g, (*lead, *cache))


@final
@dataclass(frozen=True)
class Flatten(_OtherShape):
    """(N, ...) to (N, d), row-major.

    Examples
    --------
    >>> import numpy as np
    >>> Flatten().forward((), np.ones((2, 3, 4)))[0].shape
    (2, 12)
    """

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (math.prod(shape),)


@final
@dataclass(frozen=True, repr=False)
class Reshape(_OtherShape):
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

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        numbers = math.prod(shape)
        known = math.prod(n for n in self.shape if n != -1)
        free = -1 in self.shape
        if numbers % known or (not free and numbers != known):
            expected = f"a multiple of {known} numbers" if free else f"{known} numbers"
            came = ", ".join(map(str, ("N", *shape)))
            raise ShapeError(f"{self!r}: expected {expected}, got ({came})")
        return tuple(numbers // known if n == -1 else n for n in self.shape)
