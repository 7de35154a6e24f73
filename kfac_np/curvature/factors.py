"""Kronecker factors by how they are stored: what can be done with a dense one, and a diagonal one.

Moments and factors of a block are plain arrays, which are averaged, exchanged between devices and
written to checkpoints. Their form says what they are: a factor of n inputs is stored whole, (n, n),
or as its diagonal, (n,). `factor` is the only place that looks. Layers with groups have an axis for
them in front, (groups, n, n), and everything here but `damped_inverse` acts on each group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from kfac_np.backend import (
    Array,
    Backend,
    Patches,
    Scalar,
    array_namespace,
    resolved_eigh,
    second_moment,
    spectral_norm,
    sum_by_index,
)
from kfac_np.curvature.ladder import Ladder
from kfac_np.curvature.sharing import Sharing, expand
from kfac_np.curvature.units import commensurate, usual
from kfac_np.errors import CurvatureError
from kfac_np.matrices import KroneckerDiagonal, KroneckerMatrix, Matrix
from kfac_np.statistics import AffineStatistics, EmbeddingStatistics, LocatedStatistics, Scale

__all__ = [
    "INPUTS",
    "DenseFactor",
    "DiagonalFactor",
    "Factor",
    "derivative_moment",
    "factor",
    "rescaled",
]


class Factor(ABC):
    """A symmetric positive semi-definite matrix M over the inputs or the outputs of a layer.

    Examples
    --------
    >>> import numpy as np
    >>> factor(np.eye(2)).diagonal(), factor(np.ones(2)).diagonal()
    (array([1., 1.]), array([1., 1.]))
    """

    array: Array

    @staticmethod
    @abstractmethod
    def input_moment(s: Any, sharing: Sharing, scale: Scale) -> Array:
        """A of such inputs: the weighted mean over examples and locations of ā āᵀ."""

    @abstractmethod
    def diagonal(self) -> Array:
        """The diagonal, shape ([groups,] n)."""

    @abstractmethod
    def spectral_norm(self) -> Array:
        """The largest eigenvalue (0-d array)."""

    @abstractmethod
    def quadratic(self, w: Array) -> Array:
        """wᵢᵀ M wᵢ for each row of w, shape ([groups,] rows, n) to ([groups,] rows)."""

    @abstractmethod
    def mixes_units(self) -> Scalar | bool:
        """Tell whether scales of inputs differ from each other, or from 1, by a factor of 10."""

    @abstractmethod
    def rescaled(self, u: Array) -> Array:
        """diag(u) M diag(u), stored likewise; u of shape ([groups,] n)."""

    @abstractmethod
    def damped_inverse(
        self, ladder: Ladder, name: str, shift: Array | float, previous: Array | None
    ) -> Array:
        """(M + shift · I)⁻¹ as the ladder makes it, stored likewise.

        Parameters
        ----------
        ladder : Ladder
        name : str
            Of the factor, for the record.
        shift : Scalar or float
        previous : Array or None
            The last good inverse.
        """

    @abstractmethod
    def eigh(self) -> tuple[Array, Array | None]:
        """Eigenvalues, rounding errors made 0, and eigenvectors; None stands for the identity."""

    @abstractmethod
    def apply(self, v: Array) -> Array:
        """v M for each row of v."""

    @abstractmethod
    def product(self, G: Array) -> Matrix:
        """G ⊗ M as a matrix over parameters."""


@final
@dataclass(frozen=True, eq=False)
class DenseFactor(Factor):
    """A factor stored whole.

    Attributes
    ----------
    array : Array, shape ([groups,] n, n)

    Examples
    --------
    >>> import numpy as np
    >>> DenseFactor(np.diag([1.0, 4.0])).damped_inverse(Ladder("0"), "A", 1.0, None)
    array([[0.5, 0. ],
           [0. , 0.2]])
    """

    array: Array

    @staticmethod
    def input_moment(s: AffineStatistics, sharing: Sharing, scale: Scale) -> Array:
        """A: the weighted mean of a aᵀ over rows, a chunk of examples at a time."""
        if isinstance(s.inputs, Patches) and sharing is expand and scale.weights is None:
            moment = s.inputs.second_moment()  # patches overlap: less work than row by row
            moment *= 1.0 / (s.num_examples * s.num_locations)
            return moment
        total: Any = None
        count: Any = 0.0
        first = 0  # example
        for chunk in s.inputs_only().chunks():
            rows, _ = sharing(chunk, scale)
            each = rows.shape[0] // chunk.num_examples
            weights = scale.row_weights(each * scale.examples)
            if weights is not None:
                weights = weights[first * each : first * each + rows.shape[0]]
            m = second_moment(rows, weights)
            total = m if total is None else total + m
            sums = rows.shape[0] if weights is None else array_namespace(rows).sum(weights)
            count = count + sums
            first += chunk.num_examples
            del chunk, rows  # before the next ones are unfolded
        total /= count
        return total

    def diagonal(self) -> Array:
        return array_namespace(self.array).linalg.diagonal(self.array)

    def spectral_norm(self) -> Array:
        return spectral_norm(self.array)

    def quadratic(self, w: Array) -> Array:
        return array_namespace(w).sum((w @ self.array) * w, axis=-1)

    def mixes_units(self) -> Scalar | bool:
        squares = self.diagonal()
        return array_namespace(squares).any(~(commensurate(squares) & usual(squares)))

    def rescaled(self, u: Array) -> Array:
        return rescaled(self.array, u)

    def damped_inverse(
        self, ladder: Ladder, name: str, shift: Array | float, previous: Array | None
    ) -> Array:
        return ladder.inverse(name, self.array, shift, previous)

    def eigh(self) -> tuple[Array, Array]:
        return resolved_eigh(self.array)

    def apply(self, v: Array) -> Array:
        return v @ self.array

    def product(self, G: Array) -> KroneckerMatrix:
        return KroneckerMatrix(self.array, G)


@final
@dataclass(frozen=True, eq=False)
class DiagonalFactor(Factor):
    """A factor stored as its diagonal: the second moment of one-hot inputs, as of an embedding.

    Such inputs have no other unit than 1.

    Attributes
    ----------
    array : Array, shape (n,)

    Examples
    --------
    >>> import numpy as np
    >>> DiagonalFactor(np.asarray([1.0, 2.0])).apply(np.ones((1, 2)))
    array([[1., 2.]])
    """

    array: Array

    @staticmethod
    def input_moment(s: EmbeddingStatistics, sharing: Sharing, scale: Scale) -> Array:
        """The diagonal of A for one-hot inputs: how often each of them occurs."""
        if sharing is not expand and s.indices.shape[1] > 1:
            raise CurvatureError(
                f"expected sharing by expand for an embedding used at {s.indices.shape[1]} "
                f"positions, got {getattr(sharing, '__name__', sharing)}: A is diagonal with "
                "expand only"
            )
        xp = array_namespace(s.g)
        indices = xp.reshape(s.indices, (-1,))
        weights = scale.row_weights(indices.shape[0])
        if weights is None:
            weights = xp.ones(indices.shape, dtype=s.g.dtype, device=s.g.device)
        return sum_by_index(weights[:, None], indices, s.size)[:, 0] / xp.sum(weights)

    def diagonal(self) -> Array:
        return self.array

    def spectral_norm(self) -> Array:
        return array_namespace(self.array).max(self.array)

    def quadratic(self, w: Array) -> Array:
        return array_namespace(w).sum(w * w * self.array[..., None, :], axis=-1)

    def mixes_units(self) -> Scalar | bool:
        return False

    def rescaled(self, u: Array) -> Array:
        return self.array * u * u

    def damped_inverse(
        self, ladder: Ladder, name: str, shift: Array | float, previous: Array | None
    ) -> Array:
        return ladder.inverse_diagonal(name, self.array, shift, previous)

    def eigh(self) -> tuple[Array, None]:
        return self.array, None

    def apply(self, v: Array) -> Array:
        return v * self.array[..., None, :]

    def product(self, G: Array) -> KroneckerDiagonal:
        return KroneckerDiagonal(self.array, G)


def factor(array: Array) -> Factor:
    """The factor that is stored as `array`.

    Examples
    --------
    >>> import numpy as np
    >>> type(factor(np.eye(2))).__name__, type(factor(np.ones(2))).__name__
    ('DenseFactor', 'DiagonalFactor')
    """
    return DiagonalFactor(array) if array.ndim == 1 else DenseFactor(array)


def rescaled(m: Array, u: Array) -> Array:
    """diag(u) M diag(u), shapes (..., n, n) and (..., n).

    Examples
    --------
    >>> import numpy as np
    >>> rescaled(np.ones((2, 2)), np.asarray([1.0, 3.0]))
    array([[1., 3.],
           [3., 9.]])
    """
    m = m * u[..., :, None]
    m *= u[..., None, :]
    return m


def derivative_moment(s: LocatedStatistics, sharing: Sharing, scale: Scale) -> Array:
    """G: the sum over vectors and rows of g gᵀ, divided by the number of loss terms.

    Without vectors (`InputOnly`) it is the identity.

    Parameters
    ----------
    s : LocatedStatistics
    sharing : callable
    scale : Scale

    Returns
    -------
    Array, shape (d_out, d_out)

    Examples
    --------
    >>> import numpy as np
    >>> s = AffineStatistics(np.ones((2, 1, 1)), np.asarray([[[1.0]], [[3.0]]]))
    >>> derivative_moment(s, expand, Scale(2, 2))
    array([[5.]])
    """
    if s.num_vectors == 0:
        return Backend.of(s.g).eye(s.g.shape[-1])
    _, rows = sharing(s.derivatives_only(), scale)
    moment = second_moment(rows)
    moment *= 1.0 / scale.terms
    return moment


INPUTS: Mapping[type, type[Factor]] = {
    AffineStatistics: DenseFactor,
    EmbeddingStatistics: DiagonalFactor,
}
"""The form of A by kind of statistics. What is not here has no Kronecker factors."""
