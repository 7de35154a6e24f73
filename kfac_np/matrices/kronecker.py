"""Kronecker products G ⊗ A, plain and in their eigenbasis."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

from kfac_np.backend import Array, array_namespace, resolved_eigh
from kfac_np.errors import ShapeError
from kfac_np.matrices.base import Matrix, Spectral, norm

__all__ = ["KroneckerDiagonal", "KroneckerMatrix", "KroneckerSpectral", "balanced", "kron"]


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
        a, g = self._balanced
        return g @ v @ a

    def to_dense(self) -> Array:
        return kron(self.G, self.A)

    def diagonal(self) -> Array:
        diagonal, (a, g) = array_namespace(self.A).linalg.diagonal, self._balanced
        return diagonal(g)[:, None] * diagonal(a)[None, :]

    def trace(self) -> Array:
        xp, (a, g) = array_namespace(self.A), self._balanced
        return xp.linalg.trace(a) * xp.linalg.trace(g)

    def frobenius_norm(self) -> Array:
        a, g = self._balanced
        return norm(a) * norm(g)

    @cached_property
    def _balanced(self) -> tuple[Array, Array]:
        return balanced(self.A, self.G)

    def spectral(self) -> KroneckerSpectral:
        return self._spectral

    @cached_property
    def _spectral(self) -> KroneckerSpectral:
        (a, u_a), (g, u_g) = (resolved_eigh(m) for m in self._balanced)
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
        a, g = self._balanced
        return (g @ v) * a[None, :]

    def to_dense(self) -> Array:
        eye = array_namespace(self.A).eye(self.A.shape[0], dtype=self.A.dtype, device=self.A.device)
        return kron(self.G, self.A[:, None] * eye)

    def diagonal(self) -> Array:
        a, g = self._balanced
        return array_namespace(g).linalg.diagonal(g)[:, None] * a[None, :]

    def trace(self) -> Array:
        xp, (a, g) = array_namespace(self.A), self._balanced
        return xp.sum(a) * xp.linalg.trace(g)

    def frobenius_norm(self) -> Array:
        a, g = self._balanced
        return norm(a) * norm(g)

    @cached_property
    def _balanced(self) -> tuple[Array, Array]:
        return balanced(self.A, self.G)

    def spectral(self) -> KroneckerSpectral:
        return self._spectral

    @cached_property
    def _spectral(self) -> KroneckerSpectral:
        a, g = self._balanced
        g, u_g = resolved_eigh(g)
        return KroneckerSpectral(g[:, None] * a[None, :], None, u_g)


def balanced(a: Array, g: Array) -> tuple[Array, Array]:
    """A/c and c·G with entries of about the same size, which have the same product.

    How scale is split between two factors is a convention, and must not matter: with 1e25 in one of
    them and 1e-25 in the other, squares and products on the way would overflow or vanish in single
    precision. c is a power of two, by which nothing is rounded.

    Examples
    --------
    >>> import numpy as np
    >>> balanced(np.asarray([[16.0]]), np.asarray([[1.0]]))
    (array([[4.]]), array([[4.]]))
    """
    xp = array_namespace(a, g)
    tops = [xp.max(xp.abs(m)) for m in (a, g)]
    one = xp.ones_like(tops[0])
    usable = [xp.isfinite(top) & (top > 0) for top in tops]
    logs = [xp.log2(xp.where(ok, top, one)) for ok, top in zip(usable, tops, strict=True)]
    exponent = xp.where(usable[0] & usable[1], xp.round(0.5 * (logs[0] - logs[1])), 0.0 * one)
    return a * 2.0**-exponent, g * 2.0**exponent


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
