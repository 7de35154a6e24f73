"""How parameters entered the network: what a backward pass returns besides the input derivative.

The gradient is the first moment of these statistics, every curvature approximation a second
moment of them. Nothing here divides: sums stay sums until `Scale` turns them into means.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

from kfac_np.backend import Array, Patches, array_namespace, sum_by_index, sums_above_rounding
from kfac_np.errors import ShapeError

__all__ = [
    "AffineStatistics",
    "ElementwiseStatistics",
    "EmbeddingStatistics",
    "GroupedStatistics",
    "LocatedStatistics",
    "Scale",
    "Statistics",
    "term_gradients",
]


class Statistics(ABC):
    """What all statistics can tell; curvature blocks ask a particular kind for more.

    Examples
    --------
    >>> import numpy as np
    >>> s = AffineStatistics(np.ones((5, 1, 3)), np.ones((4, 5, 1, 2)))
    >>> s.num_vectors, s.gradient().shape, s.per_example().shape
    (4, (4, 2, 3), (4, 5, 2, 3))
    """

    @property
    @abstractmethod
    def num_examples(self) -> int:
        """N."""

    @property
    @abstractmethod
    def num_vectors(self) -> int:
        """K; 1 when `g` has no such axis."""

    @property
    @abstractmethod
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of the parameter that these are the statistics of."""

    @abstractmethod
    def gradient(self) -> Array:
        """Derivative summed over examples and locations, shape ([K,] *parameter)."""

    @abstractmethod
    def per_example(self) -> Array:
        """Derivative of each example, summed over locations, shape ([K,] N, *parameter)."""

    def magnitudes(self, coupled: bool) -> Array | None:
        """What `per_example` adds up, or `gradient` if `coupled`, with absolute values.

        It tells a derivative from a rounding error of one that vanishes. A bound will do; None
        where none is known.
        """
        return None

    def along(self, v: Array) -> Array:
        """⟨derivative of each example, v⟩ for v of the parameter's shape: shape ([K,] N)."""
        if v.shape != self.parameter_shape:
            raise ShapeError(f"v: expected shape {self.parameter_shape}, got {tuple(v.shape)}")
        each = self.per_example()
        axes = tuple(range(-len(self.parameter_shape), 0))
        return array_namespace(each).sum(each * v, axis=axes)


class LocatedStatistics(Statistics):
    """Statistics that hold the derivatives `g`, shape ([K,] N, T, d_out), at every location.

    Examples
    --------
    >>> import numpy as np
    >>> s = AffineStatistics(np.ones((5, 2, 3)), np.ones((5, 2, 4)))
    >>> isinstance(s, LocatedStatistics), s.num_locations, s.stacked_g.shape
    (True, 2, (1, 5, 2, 4))
    """

    g: Array

    @property
    def num_examples(self) -> int:
        return self.g.shape[-3]

    @property
    def num_locations(self) -> int:
        """T."""
        return self.g.shape[-2]

    @property
    def num_vectors(self) -> int:
        return self.g.shape[0] if self.g.ndim == 4 else 1

    @cached_property
    def stacked_g(self) -> Array:
        """`g` with the K axis always present, shape (K, N, T, d_out)."""
        return self.g if self.g.ndim == 4 else self.g[None, ...]

    def derivatives_only(self) -> AffineStatistics:
        """The same derivatives, inputs of no columns: nothing is unfolded."""
        xp, g = array_namespace(self.g), self.g
        return AffineStatistics(xp.zeros((*g.shape[-3:-1], 0), dtype=g.dtype, device=g.device), g)


@final
@dataclass(frozen=True, eq=False)
class AffineStatistics(LocatedStatistics):
    """The pair (ā, g) of an affine layer s = W̄ ā, W̄ of shape (d_out, d_in + 1).

    Attributes
    ----------
    inputs : Array or Patches, shape (N, T, d_in + 1)
        Inputs ā with the homogeneous coordinate appended (d_in without a bias), one row for each
        example and each location at which the weights are shared (T = 1 for a plain layer). A
        convolution gives its patches, which are unfolded chunk by chunk.
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

    inputs: Array | Patches
    g: Array

    @property
    def a(self) -> Array:
        """All inputs as one array: of a convolution, unfolded whole."""
        return self.inputs.array() if isinstance(self.inputs, Patches) else self.inputs

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        return (self.g.shape[-1], self.inputs.shape[-1])

    def magnitudes(self, coupled: bool) -> Array:
        xp, a = array_namespace(self.g), self.inputs
        a = replace(a, x=xp.abs(a.x)) if isinstance(a, Patches) else xp.abs(a)
        s = AffineStatistics(a, xp.abs(self.g))
        return s.gradient() if coupled else s.per_example()

    def inputs_only(self) -> AffineStatistics:
        """The same inputs, no vectors (K = 0)."""
        return AffineStatistics(self.inputs, self.stacked_g[:0, ...])

    def chunks(self) -> Iterator[AffineStatistics]:
        """The same statistics, some examples at a time, with `inputs` as an array.

        Nothing here holds on to a chunk: without one who asked for it, it is gone.
        """
        if not isinstance(self.inputs, Patches):
            return iter((self,))
        return itertools.starmap(self._chunk, self.inputs.chunks())

    def _chunk(self, rows: slice, a: Array) -> AffineStatistics:
        return AffineStatistics(a, self.g[..., rows, :, :])

    def gradient(self) -> Array:
        if isinstance(self.inputs, Patches):
            return self.inputs.gradient(self.g)
        xp = array_namespace(self.g)
        rows = self.num_examples * self.num_locations
        a = xp.reshape(self.inputs, (rows, -1))
        g = xp.reshape(self.g, (*self.g.shape[:-3], rows, self.g.shape[-1]))
        return xp.matrix_transpose(g) @ a

    def per_example(self) -> Array:
        xp = array_namespace(self.g)
        parts = list(map(AffineStatistics._per_example, self.chunks()))
        return parts[0] if len(parts) == 1 else xp.concat(parts, axis=-3)

    def _per_example(self) -> Array:
        return array_namespace(self.g).matrix_transpose(self.g) @ self.a

    def along(self, v: Array) -> Array:
        parts = [s._along(v) for s in self.chunks()]
        return parts[0] if len(parts) == 1 else array_namespace(self.g).concat(parts, axis=-1)

    def _along(self, v: Array) -> Array:
        # gᵀ v a at each location: the derivatives of single examples are not formed.
        xp, a = array_namespace(self.g), self.a
        moved = xp.reshape(a, (-1, a.shape[-1])) @ v.T
        return xp.sum(self.g * xp.reshape(moved, self.g.shape[-3:]), axis=(-2, -1))


@final
@dataclass(frozen=True, eq=False)
class GroupedStatistics(Statistics):
    """Statistics of a grouped affine layer, W̄ of shape (groups, d_out, d_in + 1).

    Each group is an affine layer of its own: it sees its own channels and makes its own.

    Attributes
    ----------
    groups : tuple of AffineStatistics

    Examples
    --------
    >>> import numpy as np
    >>> group = AffineStatistics(np.ones((5, 2, 3)), np.ones((5, 2, 1)))
    >>> GroupedStatistics((group, group)).per_example().shape
    (5, 2, 1, 3)
    """

    groups: tuple[AffineStatistics, ...]

    @property
    def num_examples(self) -> int:
        return self.groups[0].num_examples

    @property
    def num_vectors(self) -> int:
        return self.groups[0].num_vectors

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        return (len(self.groups), *self.groups[0].parameter_shape)

    @property
    def num_locations(self) -> int:
        """T."""
        return self.groups[0].num_locations

    def magnitudes(self, coupled: bool) -> Array:
        parts = [s.magnitudes(coupled) for s in self.groups]
        return array_namespace(parts[0]).stack(parts, axis=-3)

    def gradient(self) -> Array:
        parts = [s.gradient() for s in self.groups]
        return array_namespace(parts[0]).stack(parts, axis=-3)

    def per_example(self) -> Array:
        parts = [s.per_example() for s in self.groups]
        return array_namespace(parts[0]).stack(parts, axis=-3)

    def along(self, v: Array) -> Array:
        total = self.groups[0].along(v[0, ...])
        for i, s in enumerate(self.groups[1:], start=1):
            total = total + s.along(v[i, ...])
        return total


@final
@dataclass(frozen=True, eq=False)
class EmbeddingStatistics(LocatedStatistics):
    """Statistics of an embedding, an affine layer whose inputs are one-hot, W (d_out, size).

    Attributes
    ----------
    indices : Array of int, shape (N, T)
        Which input is 1.
    g : Array, shape ([K,] N, T, d_out)
    size : int
        Number of inputs.

    Examples
    --------
    >>> import numpy as np
    >>> s = EmbeddingStatistics(np.asarray([[0, 2, 2]]), np.ones((1, 3, 1)), 4)
    >>> s.gradient()
    array([[1., 0., 2., 0.]])
    """

    indices: Array
    g: Array
    size: int

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        return (self.g.shape[-1], self.size)

    def magnitudes(self, coupled: bool) -> Array:
        s = replace(self, g=array_namespace(self.g).abs(self.g))
        return s.gradient() if coupled else s.per_example()

    def gradient(self) -> Array:
        xp = array_namespace(self.g)
        u = self._sums(xp.reshape(self.indices, (-1,)), self.size)  # (K, size, d_out)
        return self._like_g(xp.matrix_transpose(u))

    def per_example(self) -> Array:
        xp, n = array_namespace(self.g), self.num_examples
        first = xp.arange(n, dtype=self.indices.dtype, device=self.indices.device) * self.size
        each = xp.reshape(self.indices + first[:, None], (-1,))
        u = self._sums(each, n * self.size)
        u = xp.reshape(u, (self.num_vectors, n, self.size, u.shape[-1]))
        return self._like_g(xp.matrix_transpose(u))

    def along(self, v: Array) -> Array:
        xp = array_namespace(self.g)
        moved = xp.take(v.T, xp.reshape(self.indices, (-1,)), axis=0)
        return xp.sum(self.g * xp.reshape(moved, self.g.shape[-3:]), axis=(-2, -1))

    def _sums(self, indices: Array, size: int) -> Array:
        xp, g = array_namespace(self.g), self.stacked_g
        rows = xp.reshape(g, (g.shape[0], math.prod(g.shape[1:-1]), g.shape[-1]))
        if g.shape[0] == 0:
            return xp.zeros((0, size, g.shape[-1]), dtype=g.dtype, device=g.device)
        return xp.stack([sum_by_index(rows[k, ...], indices, size) for k in range(g.shape[0])])

    def _like_g(self, u: Array) -> Array:
        return u if self.g.ndim == 4 else u[0, ...]


@final
@dataclass(frozen=True, eq=False)
class ElementwiseStatistics(LocatedStatistics):
    """Statistics of a scale and shift s = γ x + β for each channel; parameters (2, C).

    Without a shift the parameters have shape (1, C).

    Attributes
    ----------
    x : Array, shape (N, T, C)
        What is scaled.
    g : Array, shape ([K,] N, T, C)
        Derivatives with respect to s.
    shift : bool

    Examples
    --------
    >>> import numpy as np
    >>> s = ElementwiseStatistics(np.full((5, 1, 3), 2.0), np.ones((5, 1, 3)), True)
    >>> s.gradient()
    array([[10., 10., 10.],
           [ 5.,  5.,  5.]])
    """

    x: Array
    g: Array
    shift: bool

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        return (2 if self.shift else 1, self.g.shape[-1])

    def magnitudes(self, coupled: bool) -> Array:
        # (Σ |g x|)² ≤ Σ g² Σ x², which takes no arrays of the size of g.
        xp = array_namespace(self.g)
        number = self.num_locations * (self.num_examples if coupled else 1)
        squares = [xp.vecdot(y, y, axis=-2) for y in (self.g, self.x)]
        g, x = (xp.sum(y, axis=-2) for y in squares) if coupled else squares
        parts = [g * x, number * g] if self.shift else [g * x]
        return xp.sqrt(xp.stack(parts, axis=-2))

    def gradient(self) -> Array:
        return array_namespace(self.g).sum(self.per_example(), axis=-3)

    def per_example(self) -> Array:
        xp = array_namespace(self.g)
        parts = [xp.sum(self.g * self.x, axis=-2)]
        if self.shift:
            parts.append(xp.sum(self.g, axis=-2))
        return xp.stack(parts, axis=-2)


def term_gradients(s: Statistics, scale: Scale) -> Array:
    """Derivatives that a Fisher matrix squares, one a vector and example, as rows.

    Where examples influence each other (batch statistics) an example has no derivative of its
    own: the batch is one example, and there is one row a vector. A column of which there are but
    rounding errors is 0: see `kfac_np.backend.above_rounding`.

    Returns
    -------
    Array, shape (R, P)
        R = K · N, or K where examples are coupled; P parameters, flattened row-major.

    Examples
    --------
    >>> import numpy as np
    >>> s = AffineStatistics(np.ones((5, 1, 3)), np.ones((4, 5, 1, 2)))
    >>> term_gradients(s, Scale(5, 5)).shape, term_gradients(s, Scale(5, 5, coupled=True)).shape
    ((20, 6), (4, 6))
    """
    u = s.gradient() if scale.coupled else s.per_example()
    rows = array_namespace(u).reshape(u, (-1, math.prod(s.parameter_shape)))
    single = isinstance(s, LocatedStatistics | GroupedStatistics) and s.num_locations == 1
    magnitudes = s.magnitudes(scale.coupled) if scale.coupled or not single else None
    if magnitudes is None:
        return rows
    return sums_above_rounding(rows, array_namespace(rows).reshape(magnitudes, rows.shape))


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
    coupled : bool
        Whether an example's output depends on the others (batch statistics).

    Examples
    --------
    >>> Scale(terms=8, examples=4).positions
    2
    """

    terms: int
    examples: int
    weights: Array | None = None
    coupled: bool = False

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
