"""Blocks along an axis of one parameter: grouped layers, and units of a few weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import final

from kfac_np.backend import Array, array_namespace
from kfac_np.errors import ShapeError
from kfac_np.matrices.base import Matrix, Spectral, norm

__all__ = ["StackedMatrix", "StackedSpectral", "UnitMatrix", "UnitSpectral"]


@final
@dataclass(frozen=True, eq=False)
class StackedMatrix(Matrix):
    """Block-diagonal over the first axis of the operand: block i acts on V[i].

    Attributes
    ----------
    blocks : tuple of Matrix
        All of the same operand shape.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.matrices import DiagonalMatrix
    >>> C = StackedMatrix((DiagonalMatrix(np.asarray([1.0])), DiagonalMatrix(np.asarray([2.0]))))
    >>> C.matvec(np.ones((2, 1)))
    array([[1.],
           [2.]])
    """

    blocks: tuple[Matrix, ...]

    @property
    def operand_shape(self) -> tuple[int, ...]:
        return (len(self.blocks), *self.blocks[0].operand_shape)

    def matvec(self, v: Array) -> Array:
        parts = [block.matvec(v[i, ...]) for i, block in enumerate(self.blocks)]
        return array_namespace(v).stack(parts)

    def to_dense(self) -> Array:
        return _block_diagonal([block.to_dense() for block in self.blocks])

    def diagonal(self) -> Array:
        parts = [block.diagonal() for block in self.blocks]
        return array_namespace(*parts).stack(parts)

    def trace(self) -> Array:
        return self._sum(lambda block: block.trace())

    def frobenius_norm(self) -> Array:
        norms = [block.frobenius_norm() for block in self.blocks]
        return norm(array_namespace(*norms).stack(norms))

    def spectral(self) -> StackedSpectral:
        return self._spectral

    @cached_property
    def _spectral(self) -> StackedSpectral:
        parts = tuple(block.spectral() for block in self.blocks)
        values = [part.values for part in parts]
        return StackedSpectral(array_namespace(*values).stack(values), parts)

    def _sum(self, function: Callable[[Matrix], Array]) -> Array:
        parts = [function(block) for block in self.blocks]
        return array_namespace(*parts).sum(array_namespace(*parts).stack(parts))


@final
@dataclass(frozen=True, eq=False)
class StackedSpectral(Spectral):
    """A `StackedMatrix`, eigendecomposed.

    Attributes
    ----------
    values : Array
        Eigenvalues of the blocks, stacked.
    parts : tuple of Spectral
        Blocks that have the eigenvectors.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.matrices import DiagonalMatrix
    >>> C = StackedMatrix((DiagonalMatrix(np.asarray([1.0])), DiagonalMatrix(np.asarray([4.0]))))
    >>> C.power(0.5).matvec(np.ones((2, 1)))[:, 0]
    array([1., 2.])
    """

    parts: tuple[Spectral, ...]

    @property
    def operand_shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].operand_shape)

    def with_values(self, values: Array) -> StackedSpectral:
        parts = [part.with_values(values[i, ...]) for i, part in enumerate(self.parts)]
        return StackedSpectral(values, tuple(parts))

    def matvec(self, v: Array) -> Array:
        parts = [part.matvec(v[i, ...]) for i, part in enumerate(self.parts)]
        return array_namespace(v).stack(parts)

    def diagonal(self) -> Array:
        parts = [part.diagonal() for part in self.parts]
        return array_namespace(*parts).stack(parts)

    def to_dense(self) -> Array:
        return _block_diagonal([part.to_dense() for part in self.parts])


@final
@dataclass(frozen=True, eq=False)
class UnitMatrix(Matrix):
    """A small block for each column of the operand: block c acts on V[:, c].

    Attributes
    ----------
    blocks : Array, shape (C, r, r)
        Symmetric positive semi-definite; r is 1 or 2.

    Examples
    --------
    >>> import numpy as np
    >>> C = UnitMatrix(np.asarray([[[2.0, 1.0], [1.0, 2.0]]]))
    >>> C.matvec(np.asarray([[1.0], [0.0]]))
    array([[2.],
           [1.]])
    """

    blocks: Array

    def __post_init__(self) -> None:
        shape = tuple(self.blocks.shape)
        if len(shape) != 3 or shape[1] != shape[2] or shape[1] not in (1, 2):
            raise ShapeError(f"blocks: expected shape (C, 1, 1) or (C, 2, 2), got {shape}")

    @property
    def operand_shape(self) -> tuple[int, ...]:
        return (self.blocks.shape[1], self.blocks.shape[0])

    def matvec(self, v: Array) -> Array:
        return (self.blocks @ v.T[..., None])[..., 0].T

    def to_dense(self) -> Array:
        return _units_to_dense(self.blocks)

    def diagonal(self) -> Array:
        return array_namespace(self.blocks).linalg.diagonal(self.blocks).T

    def trace(self) -> Array:
        xp = array_namespace(self.blocks)
        return xp.sum(xp.linalg.trace(self.blocks))

    def frobenius_norm(self) -> Array:
        return norm(self.blocks)

    def spectral(self) -> UnitSpectral:
        return self._spectral

    @cached_property
    def _spectral(self) -> UnitSpectral:
        return UnitSpectral(*unit_eigh(self.blocks))


@final
@dataclass(frozen=True, eq=False)
class UnitSpectral(Spectral):
    """A `UnitMatrix`, eigendecomposed.

    Attributes
    ----------
    values : Array, shape (r, C)
    U : Array, shape (C, r, r)
        Eigenvectors of each block as columns.

    Examples
    --------
    >>> import numpy as np
    >>> UnitMatrix(np.asarray([[[2.0, 1.0], [1.0, 2.0]]])).spectral().values
    array([[3.],
           [1.]])
    """

    U: Array

    @property
    def operand_shape(self) -> tuple[int, ...]:
        return self.values.shape

    def with_values(self, values: Array) -> UnitSpectral:
        return UnitSpectral(values, self.U)

    def matvec(self, v: Array) -> Array:
        return unit_apply(self.U, self.values, v)

    def diagonal(self) -> Array:
        xp = array_namespace(self.U)
        return xp.sum(self.U**2 * self.values.T[:, None, :], axis=-1).T

    def to_dense(self) -> Array:
        xp = array_namespace(self.U)
        scaled = self.U * self.values.T[:, None, :]
        return _units_to_dense(scaled @ xp.matrix_transpose(self.U))


def unit_apply(U: Array, values: Array, v: Array) -> Array:
    """U diag(values) Uᵀ v for each column of v, shapes (C, r, r), (r, C), (r, C).

    Examples
    --------
    >>> import numpy as np
    >>> unit_apply(np.ones((3, 1, 1)), np.ones((1, 3)), np.ones((1, 3)))
    array([[1., 1., 1.]])
    """
    xp = array_namespace(U)
    rotated = xp.matrix_transpose(U) @ v.T[..., None]
    return (U @ (values.T[..., None] * rotated))[..., 0].T


def unit_eigh(blocks: Array) -> tuple[Array, Array]:
    """Eigenvalues (r, C), the largest first, and eigenvectors (C, r, r) of many small blocks.

    In closed form, elementwise over the blocks. The smaller eigenvalue is the determinant over the
    larger one, so that rows of very different size (a scale and a shift have their own) lose no
    digits; where rounding is all there is of the determinant it is made 0.

    Examples
    --------
    >>> import numpy as np
    >>> values, U = unit_eigh(np.asarray([[[1.0, 1.0], [1.0, 1.0]]]))
    >>> values[:, 0].round(12), bool(np.allclose(abs(U), 0.5**0.5))
    (array([2., 0.]), True)
    """
    xp = array_namespace(blocks)
    if blocks.shape[1] == 1:
        return blocks[:, :, 0].T, xp.ones_like(blocks)
    a, b, d = blocks[:, 0, 0], 0.5 * (blocks[:, 0, 1] + blocks[:, 1, 0]), blocks[:, 1, 1]
    mean, half = 0.5 * (a + d), 0.5 * (a - d)
    radius = xp.hypot(half, b)
    large = mean + radius
    safe = xp.where(large > 0, large, xp.ones_like(large))
    product = a * (d / safe)
    small = product - b * (b / safe)
    lost = small <= 4.0 * xp.finfo(blocks.dtype).eps * product
    small = xp.where(lost, xp.zeros_like(small), small)
    # The angle from the axis of the larger entry: near 0, a small one keeps its digits.
    angle = 0.5 * xp.atan2(b, xp.abs(half))
    first = half >= 0
    c = xp.where(first, xp.cos(angle), xp.sin(angle))
    s = xp.where(first, xp.sin(angle), xp.cos(angle))
    U = xp.stack([xp.stack([c, -s], axis=-1), xp.stack([s, c], axis=-1)], axis=-2)
    return xp.stack([large, small]), U


def _units_to_dense(blocks: Array) -> Array:
    """Dense (r · C, r · C), rows ordered by the row-major flattening of (r, C)."""
    xp = array_namespace(blocks)
    c, r, _ = blocks.shape
    eye = xp.eye(c, dtype=blocks.dtype, device=blocks.device)
    each = xp.permute_dims(blocks, (1, 2, 0))[:, :, :, None] * eye[None, None, :, :]  # (r, r, C, C)
    return xp.reshape(xp.permute_dims(each, (0, 2, 1, 3)), (r * c, r * c))


def _block_diagonal(dense: list[Array]) -> Array:
    xp = array_namespace(*dense)
    n, total = dense[0].shape[0], len(dense) * dense[0].shape[0]
    out = xp.zeros((total, total), dtype=dense[0].dtype, device=dense[0].device)
    for i, d in enumerate(dense):
        out[i * n : (i + 1) * n, i * n : (i + 1) * n] = d
    return out
