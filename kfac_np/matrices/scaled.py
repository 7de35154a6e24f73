"""A matrix in other units."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

from kfac_np.backend import Array, array_namespace
from kfac_np.errors import ShapeError
from kfac_np.matrices.base import Matrix, Spectral
from kfac_np.matrices.dense import DenseMatrix

__all__ = ["ScaledMatrix"]


@final
@dataclass(frozen=True, eq=False)
class ScaledMatrix(Matrix):
    """diag(d) C diag(d): C acts on parameters in units of its own.

    Products, trace and diagonal go through C. Everything else has no form of its own, and goes
    through the matrix written out.

    Attributes
    ----------
    matrix : Matrix
        C.
    units : Array, of the operand's shape
        d.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.matrices import DenseMatrix
    >>> C = ScaledMatrix(DenseMatrix(np.ones((2, 2)), (2,)), np.asarray([1.0, 10.0]))
    >>> C.to_dense()
    array([[  1.,  10.],
           [ 10., 100.]])
    """

    matrix: Matrix
    units: Array

    def __post_init__(self) -> None:
        expected, shape = self.matrix.operand_shape, tuple(self.units.shape)
        if shape != expected:
            raise ShapeError(f"units: expected shape {expected}, got {shape}")

    @property
    def operand_shape(self) -> tuple[int, ...]:
        return self.matrix.operand_shape

    def matvec(self, v: Array) -> Array:
        return self.units * self.matrix.matvec(self.units * v)

    def to_dense(self) -> Array:
        d = array_namespace(self.units).reshape(self.units, (-1,))
        return d[:, None] * self.matrix.to_dense() * d[None, :]

    def trace(self) -> Array:
        return array_namespace(self.units).sum(self.diagonal())

    def diagonal(self) -> Array:
        return self.units**2 * self.matrix.diagonal()

    def frobenius_norm(self) -> Array:
        return self._dense.frobenius_norm()

    def spectral(self) -> Spectral:
        return self._dense.spectral()

    @cached_property
    def _dense(self) -> DenseMatrix:
        return DenseMatrix(self.to_dense(), self.operand_shape)
