"""Kronecker products G ⊗ A, plain and in their eigenbasis."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

from kfac_np.backend import Array, array_namespace
from kfac_np.errors import ShapeError
from kfac_np.matrices.base import Matrix, Spectral, resolved_eigh

__all__ = ["KroneckerDiagonal", "KroneckerMatrix", "KroneckerSpectral", "kron"]


@final
@dataclass(frozen=True, eq=False)
class KroneckerMatrix(Matrix):
    """G ⊗ A acting as V ↦ G V A on V of shape (d_out, d_in).

    Attributes
    ----------
    A : Array, shape (d_in, d_in)
        Second moment of inputs, symmetric positive semi-definite.
    G : Array, shape (d_out, d_out)
        Second moment of output derivatives, likewise.

    References
    ----------
    Martens & Grosse 2015, §3 (which orders vectors by columns, so that the factors swap).

    Examples
    --------
    >>> import numpy as np
    >>> A, G, V = np.diag([1.0, 2.0]), np.diag([3.0]), np.ones((1, 2))
    >>> C = KroneckerMatrix(A, G)
    >>> C.matvec(V)
    array([[3., 6.]])
    >>> bool(np.all(C.to_dense() == np.kron(G, A))), float(C.trace())
    (True, 9.0)
    """

    A: Array
    G: Array

    def __post_init__(self) -> None:
        for name, factor in (("A", self.A), ("G", self.G)):
            if factor.ndim != 2 or factor.shape[0] != factor.shape[1]:
                shape = tuple(factor.shape)
                raise ShapeError(f"{name}: expected a square matrix, got shape {shape}")

    @property
    def operand_shape(self) -> tuple[int, ...]:
        return (self.G.shape[0], self.A.shape[0])

    def matvec(self, v: Array) -> Array:
        return self.G @ v @ self.A

    def to_dense(self) -> Array:
        return kron(self.G, self.A)

    def diagonal(self) -> Array:
        diagonal = array_namespace(self.A).linalg.diagonal
        return diagonal(self.G)[:, None] * diagonal(self.A)[None, :]

    def trace(self) -> Array:
        xp = array_namespace(self.A)
        return xp.linalg.trace(self.A) * xp.linalg.trace(self.G)

    def frobenius_norm(self) -> Array:
        xp = array_namespace(self.A)
        return xp.linalg.matrix_norm(self.A) * xp.linalg.matrix_norm(self.G)

    def spectral(self) -> KroneckerSpectral:
        return self._spectral

    @cached_property
    def _spectral(self) -> KroneckerSpectral:
        a, u_a = resolved_eigh(self.A)
        g, u_g = resolved_eigh(self.G)
        return KroneckerSpectral(g[:, None] * a[None, :], u_a, u_g)


@final
@dataclass(frozen=True, eq=False)
class KroneckerSpectral(Spectral):
    """(U_G ⊗ U_A) diag(values) (U_G ⊗ U_A)ᵀ with free eigenvalues.

    Attributes
    ----------
    values : Array, shape (d_out, d_in)
        λ^G_i λ^A_j for a Kronecker product; any non-negative numbers otherwise (EKFAC, damping).
    U_A : Array or None, shape (d_in, d_in)
    U_G : Array, shape (d_out, d_out)
        Orthogonal, eigenvectors in columns; None stands for the identity.

    References
    ----------
    George et al. 2018, arXiv:1806.03884, eq. 4.

    Examples
    --------
    >>> import numpy as np
    >>> C = KroneckerSpectral(np.asarray([[1.0, 2.0]]), np.eye(2), np.eye(1))
    >>> C.solve(np.ones((1, 2)), damping=1.0)
    array([[0.5       , 0.33333333]])
    """

    U_A: Array | None
    U_G: Array

    @property
    def operand_shape(self) -> tuple[int, ...]:
        return self.values.shape

    def with_values(self, values: Array) -> KroneckerSpectral:
        return KroneckerSpectral(values, self.U_A, self.U_G)

    def matvec(self, v: Array) -> Array:
        v = self.U_G.T @ v
        v = self.values * (v if self.U_A is None else v @ self.U_A)
        v = self.U_G @ v
        return v if self.U_A is None else v @ self.U_A.T

    def diagonal(self) -> Array:
        values = self.U_G**2 @ self.values
        return values if self.U_A is None else values @ (self.U_A**2).T

    def to_dense(self) -> Array:
        xp, values = array_namespace(self.values), self.values
        u_a = self.U_A
        if u_a is None:
            u_a = xp.eye(values.shape[1], dtype=values.dtype, device=values.device)
        u = kron(self.U_G, u_a)
        return (u * xp.reshape(self.values, (1, -1))) @ u.T


@final
@dataclass(frozen=True, eq=False)
class KroneckerDiagonal(Matrix):
    """G ⊗ diag(A) acting as V ↦ G V diag(A): the inputs are one-hot, as those of an embedding.

    Attributes
    ----------
    A : Array, shape (d_in,)
        The diagonal.
    G : Array, shape (d_out, d_out)

    Examples
    --------
    >>> import numpy as np
    >>> KroneckerDiagonal(np.asarray([1.0, 2.0]), np.diag([3.0])).matvec(np.ones((1, 2)))
    array([[3., 6.]])
    """

    A: Array
    G: Array

    @property
    def operand_shape(self) -> tuple[int, ...]:
        return (self.G.shape[0], self.A.shape[0])

    def matvec(self, v: Array) -> Array:
        return (self.G @ v) * self.A[None, :]

    def to_dense(self) -> Array:
        eye = array_namespace(self.A).eye(self.A.shape[0], dtype=self.A.dtype, device=self.A.device)
        return kron(self.G, self.A[:, None] * eye)

    def diagonal(self) -> Array:
        return array_namespace(self.G).linalg.diagonal(self.G)[:, None] * self.A[None, :]

    def trace(self) -> Array:
        xp = array_namespace(self.A)
        return xp.sum(self.A) * xp.linalg.trace(self.G)

    def frobenius_norm(self) -> Array:
        xp = array_namespace(self.A)
        return xp.sqrt(xp.sum(self.A * self.A)) * xp.linalg.matrix_norm(self.G)

    def spectral(self) -> KroneckerSpectral:
        return self._spectral

    @cached_property
    def _spectral(self) -> KroneckerSpectral:
        g, u_g = resolved_eigh(self.G)
        return KroneckerSpectral(g[:, None] * self.A[None, :], None, u_g)


def kron(g: Array, a: Array) -> Array:
    """G ⊗ A of any two matrices.

    Examples
    --------
    >>> import numpy as np
    >>> kron(np.asarray([[1.0, 2.0]]), np.ones((2, 1)))
    array([[1., 2.],
           [1., 2.]])
    """
    # Not `array_api_extra.kron`: PyTorch's own refuses operands of some memory orders.
    shape = (g.shape[0] * a.shape[0], g.shape[1] * a.shape[1])
    return array_namespace(g, a).reshape(g[:, None, :, None] * a[None, :, None, :], shape)
