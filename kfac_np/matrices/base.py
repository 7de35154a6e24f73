"""What every matrix over one parameter can do."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from kfac_np.backend import Array, Backend, Rng, all_finite, array_namespace, rounding_error
from kfac_np.errors import FactorizationError, InputError

__all__ = [
    "Matrix",
    "Spectral",
    "norm",
    "require_damping",
]


class Matrix(ABC):
    """A symmetric positive semi-definite matrix C acting on arrays of one parameter's shape.

    A subclass gives `matvec`, `to_dense`, `trace`, `frobenius_norm`, `operand_shape` and
    `spectral`; everything that needs the inverse, a power or a determinant goes through the
    eigendecomposition. `damping` λ always means the matrix C + λI itself, exactly.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.matrices import KroneckerMatrix
    >>> C = KroneckerMatrix(A=np.diag([1.0, 2.0]), G=np.diag([3.0, 4.0]))
    >>> V = np.ones((2, 2))
    >>> bool(np.allclose(C.solve(C.matvec(V) + 0.1 * V, damping=0.1), V))
    True
    """

    @property
    @abstractmethod
    def operand_shape(self) -> tuple[int, ...]:
        """Shape of the parameter the matrix acts on."""

    @abstractmethod
    def matvec(self, v: Array) -> Array:
        """C v, in the shape of v."""

    @abstractmethod
    def to_dense(self) -> Array:
        """C itself, shape (n, n), rows ordered by the row-major flattening of the operand."""

    @abstractmethod
    def trace(self) -> Array:
        """Sum of the diagonal (0-d array)."""

    def diagonal(self) -> Array:
        """The diagonal, in the operand's shape.

        Override it where it is had for less than the matrix written out.
        """
        dense = self.to_dense()
        xp = array_namespace(dense)
        return xp.reshape(xp.linalg.diagonal(dense), self.operand_shape)

    @abstractmethod
    def frobenius_norm(self) -> Array:
        """Root of the sum of squared entries (0-d array)."""

    @abstractmethod
    def spectral(self) -> Spectral:
        """The same matrix, eigendecomposed (cached)."""

    def solve(self, v: Array, damping: float = 0.0) -> Array:
        """(C + damping · I)⁻¹ v.

        Raises
        ------
        FactorizationError
            The damped matrix is numerically singular.
        InputError
            Damping is negative or not finite; so for all that takes it.
        """
        require_damping(damping)
        return self.spectral().power(-1.0, damping).matvec(v)

    def power(self, exponent: float, damping: float = 0.0) -> Matrix:
        """(C + damping · I) to any real power.

        Raises
        ------
        FactorizationError
            A negative power of a numerically singular matrix.
        """
        return self.spectral().power(exponent, damping)

    def logdet(self, damping: float = 0.0) -> Array:
        """Log-determinant of C + damping · I (0-d array; -inf where it is singular)."""
        return self.spectral().logdet(damping)

    def sample(self, rng: Rng, damping: float = 0.0, *, inverse: bool = False) -> Array:
        """Draw from N(0, C + damping · I), or from N(0, (C + damping · I)⁻¹), on from `rng`.

        Returns
        -------
        Array, of the operand's shape
        """
        root = self.spectral().power(-0.5 if inverse else 0.5, damping)
        return root.matvec(rng.normal(self.operand_shape, Backend.of(root.eigenvalues())))


@dataclass(frozen=True, eq=False)
class Spectral(Matrix):
    """A matrix in eigen-form U diag(values) Uᵀ; subclasses say what U is.

    Attributes
    ----------
    values : Array
        Eigenvalues, in a shape that suits U.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.matrices import DenseMatrix
    >>> root = DenseMatrix(np.diag([4.0, 9.0]), (2,)).power(0.5)
    >>> root.to_dense()
    array([[2., 0.],
           [0., 3.]])
    """

    values: Array

    @abstractmethod
    def with_values(self, values: Array) -> Self:
        """The same eigenvectors with other eigenvalues."""

    def spectral(self) -> Spectral:
        return self

    def eigenvalues(self) -> Array:
        """All eigenvalues as a vector, in no particular order, shape (n,)."""
        return array_namespace(self.values).reshape(self.values, (-1,))

    def trace(self) -> Array:
        return array_namespace(self.values).sum(self.values)

    def frobenius_norm(self) -> Array:
        return norm(self.values)

    def power(self, exponent: float, damping: float = 0.0) -> Self:
        """(C + damping · I) to any real power; directions without curvature stay without.

        Raises
        ------
        FactorizationError
            A negative power while some direction has neither curvature nor damping above
            rounding error; a matrix that is not finite.
        """
        xp = array_namespace(self.values)
        values, absent = self._damped(damping)
        if exponent < 0 and bool(xp.any(absent)):
            raise FactorizationError(
                f"power {exponent:g}: the matrix is numerically singular (smallest damped "
                f"eigenvalue {float(xp.min(values)):.3g}); give more damping than {damping:g}"
            )
        return self.with_values(xp.where(absent, xp.zeros_like(values), values) ** exponent)

    def logdet(self, damping: float = 0.0) -> Array:
        xp = array_namespace(self.values)
        values, absent = self._damped(damping)
        log = xp.log(xp.where(absent, xp.ones_like(values), values))
        return xp.sum(xp.where(absent, -xp.inf, log))

    def _damped(self, damping: float) -> tuple[Array, Array]:
        """Damped eigenvalues, and a mask of those that are zero up to rounding.

        An eigenvalue is what its decomposition says, however small: what rounding made of a zero
        was made zero there. Damping, however, is added to a matrix, and is lost in it below its
        rounding error.
        """
        require_damping(damping)
        if not all_finite(self.values):
            raise FactorizationError(f"a matrix over {self.operand_shape} has NaN or Inf")
        values = self.values + damping
        floor = rounding_error(values, max(self.operand_shape))
        lost = (self.values <= 0) & (values <= floor)
        return values, array_namespace(values).logical_or(values <= 0, lost)


def norm(x: Array) -> Array:
    """Root of the sum of squares of all entries (0-d array), where squares overflow, too.

    Examples
    --------
    >>> import numpy as np
    >>> float(norm(np.asarray([[3.0, 4.0]], dtype=np.float32) * np.float32(2.0**90)) / 2.0**90)
    5.0
    """
    xp = array_namespace(x)
    largest = xp.max(xp.abs(x))
    usable = xp.isfinite(largest) & (largest > 0)
    scaled = x / xp.where(usable, largest, xp.ones_like(largest))
    return xp.where(usable, largest * xp.sqrt(xp.sum(scaled * scaled)), largest)


def require_damping(damping: object) -> None:
    """Raise `InputError` unless damping is a finite number >= 0; a 0-d array is one.

    Examples
    --------
    >>> require_damping(-1.0)
    Traceback (most recent call last):
    kfac_np.errors.InputError: damping: expected a finite number >= 0, got -1.0
    """
    number = math.nan
    if not isinstance(damping, bool | str):
        with suppress(TypeError, ValueError):
            number = float(damping)  # type: ignore[arg-type]
    if not (math.isfinite(number) and number >= 0):
        raise InputError(f"damping: expected a finite number >= 0, got {damping}")
