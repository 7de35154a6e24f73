"""How parameters entered the network: what a backward pass returns besides the input derivative.

The gradient is the first moment of these statistics, every curvature approximation a second
moment of them. Nothing here divides: sums stay sums until :class:`Scale` turns them into means.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

from kfac_np.backend import Array, array_namespace
from kfac_np.errors import ShapeError

__all__ = ["AffineStatistics", "Scale"]


@final
@dataclass(frozen=True, eq=False)
class AffineStatistics:
    """The pair (ā, g) of an affine layer s = W̄ ā.

    Attributes
    ----------
    a : Array, shape (N, T, d_in + 1)
        Inputs with the homogeneous coordinate appended (d_in without a bias), one row for each
        example and each location at which the weights are shared (T = 1 for a plain layer).
    g : Array, shape ([K,] N, T, d_out)
        Derivatives of K scalars per example (of one, without the axis) with respect to s;
        not divided by anything.

    Examples
    --------
    >>> import numpy as np
    >>> s = AffineStatistics(np.ones((5, 1, 3)), np.ones((4, 5, 1, 2)))
    >>> s.num_vectors, s.num_examples, s.num_locations
    (4, 5, 1)
    >>> s.gradient().shape, s.per_example().shape
    ((4, 2, 3), (4, 5, 2, 3))
    """

    a: Array
    g: Array

    @property
    def num_examples(self) -> int:
        """N."""
        return self.a.shape[0]

    @property
    def num_locations(self) -> int:
        """T."""
        return self.a.shape[1]

    @property
    def num_vectors(self) -> int:
        """K; 1 when the axis is absent."""
        return self.g.shape[0] if self.g.ndim == 4 else 1

    @cached_property
    def stacked_g(self) -> Array:
        """`g` with the K axis always present, shape (K, N, T, d_out)."""
        return self.g if self.g.ndim == 4 else self.g[None, ...]

    def gradient(self) -> Array:
        """Sum over examples and locations of g āᵀ.

        Returns
        -------
        Array, shape ([K,] d_out, d_in + 1)
        """
        xp = array_namespace(self.a)
        rows = self.num_examples * self.num_locations
        a = xp.reshape(self.a, (rows, -1))
        g = xp.reshape(self.g, (*self.g.shape[:-3], rows, self.g.shape[-1]))
        return xp.matrix_transpose(g) @ a

    def per_example(self) -> Array:
        """U_n = sum over locations of g āᵀ, one matrix an example (and a vector).

        Returns
        -------
        Array, shape ([K,] N, d_out, d_in + 1)
        """
        xp = array_namespace(self.a)
        return xp.matrix_transpose(self.g) @ self.a


@final
@dataclass(frozen=True, eq=False)
class Scale:
    """The one place that owns the scale: how sums over a batch become means.

    A loss is the mean over M terms, each multiplied by its example's weight; every curvature
    is divided by the same M. A weight of 2 means what the example twice in the batch would mean,
    up to M.

    Attributes
    ----------
    terms : int
        M: the number of examples times the number of positions with a target of their own.
    examples : int
        N.
    weights : Array or None, shape (N,)
        Non-negative weights of the examples; all 1 when None.

    Examples
    --------
    >>> Scale(terms=8, examples=4).positions
    2
    """

    terms: int
    examples: int
    weights: Array | None = None

    @property
    def positions(self) -> int:
        """Loss terms an example, S = M / N."""
        return self.terms // self.examples

    def row_weights(self, rows: int) -> Array | None:
        """Weights for `rows` = N · T rows ordered by example, shape (rows,), or None.

        Raises
        ------
        ShapeError
            `rows` is not a multiple of the number of examples.
        """
        if rows % self.examples:
            raise ShapeError(f"rows: expected a multiple of {self.examples} examples, got {rows}")
        if self.weights is None:
            return None
        xp = array_namespace(self.weights)
        per_example = rows // self.examples
        return xp.reshape(
            xp.broadcast_to(self.weights[:, None], (self.examples, per_example)), (rows,)
        )
