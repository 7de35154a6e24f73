"""A matrix stored whole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import final

from kfac_np.backend import Array, array_namespace, resolved_eigh
from kfac_np.errors import ShapeError
from kfac_np.matrices.base import Matrix, Spectral, norm

__all__ = ["DenseMatrix", "DenseSpectral"]


@final
@dataclass(frozen=True, eq=False)
class DenseMatrix(Matrix):
    """A stored n × n matrix acting on arrays with n entries.

    Attributes
    ----------
    array : Array, shape (n, n)
    shape : tuple of int
        The operand's shape, whose product is n.

    Examples
    --------
    >>> import numpy as np
    >>> C = DenseMatrix(np.diag([1.0, 2.0, 3.0, 4.0]), (2, 2))
    >>> C.matvec(np.ones((2, 2)))
    array([[1., 2.],
           [3., 4.]])
    """

    array: Array
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        n = math.prod(self.shape)
        if self.array.shape != (n, n):
            raise ShapeError(f"array: expected shape {(n, n)}, got {tuple(self.array.shape)}")

    @property
    def operand_shape(self) -> tuple[int, ...]:
        return self.shape

    def matvec(self, v: Array) -> Array:
        return _apply(self.array, v)

    def to_dense(self) -> Array:
        return self.array

    def trace(self) -> Array:
        return array_namespace(self.array).linalg.trace(self.array)

    def frobenius_norm(self) -> Array:
        return norm(self.array)

    def spectral(self) -> DenseSpectral:
        return self._spectral

    @cached_property
    def _spectral(self) -> DenseSpectral:
        values, vectors = resolved_eigh(self.array)
        return DenseSpectral(values, vectors, self.shape)


@final
@dataclass(frozen=True, eq=False)
class DenseSpectral(Spectral):
    """U diag(values) Uᵀ with U stored whole.

    Attributes
    ----------
    values : Array, shape (n,)
    vectors : Array, shape (n, n)
    shape : tuple of int
        The operand's shape.

    Examples
    --------
    >>> import numpy as np
    >>> DenseSpectral(np.asarray([2.0]), np.eye(1), (1, 1)).matvec(np.ones((1, 1)))
    array([[2.]])
    """

    vectors: Array
    shape: tuple[int, ...]

    @property
    def operand_shape(self) -> tuple[int, ...]:
        return self.shape

    def with_values(self, values: Array) -> DenseSpectral:
        return DenseSpectral(values, self.vectors, self.shape)

    def diagonal(self) -> Array:
        xp = array_namespace(self.values)
        return xp.reshape(self.vectors**2 @ self.values, self.shape)

    def matvec(self, v: Array) -> Array:
        return _apply((self.vectors * self.values[None, :]) @ self.vectors.T, v)

    def to_dense(self) -> Array:
        return (self.vectors * self.values[None, :]) @ self.vectors.T


def _apply(m: Array, v: Array) -> Array:
    xp = array_namespace(v)
    return xp.reshape(m @ xp.reshape(v, (-1,)), v.shape)
