"""Embeddings: an affine layer whose inputs are integers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, final

from kfac_np.backend import (
    Array,
    Backend,
    DeferredChecks,
    Rng,
    array_namespace,
    require_array,
    require_indices,
)
from kfac_np.errors import InputError
from kfac_np.layers import affine
from kfac_np.layers.base import Layer
from kfac_np.layers.initializers import Initializer
from kfac_np.statistics import EmbeddingStatistics
from kfac_np.trees import Tree

__all__ = ["Embedding", "standard_normal"]


def standard_normal(rng: Rng, fan_in: int, fan_out: int, backend: Backend) -> Array:
    """Normal weights of variance 1: of one-hot inputs a single one counts, however many there are.

    Examples
    --------
    >>> from kfac_np.backend import get_backend
    >>> standard_normal(Rng(0), 3, 2, get_backend()).shape
    (2, 3)
    """
    return rng.normal((fan_out, fan_in), backend)


@final
@dataclass(frozen=True, repr=False)
class Embedding(Layer):
    """y_t = W e_{x_t}, column x_t of W, for integers x of shape (N, T, ...).

    The same as `Dense` without bias on one-hot inputs, which are never formed. Being the first
    layer of a network it has no input derivative: `backward` returns None for it.

    Parameters are W, shape (d_out, size).

    Parameters
    ----------
    size : int
        Inputs are 0..size-1.
    d_out : int
    initializer : callable
        (rng, size, d_out, backend) -> W.

    Examples
    --------
    >>> import numpy as np
    >>> W = np.asarray([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    >>> Embedding(3, 2).forward(W, np.asarray([[2, 0]]))[0]
    array([[[ 3., 30.],
            [ 1., 10.]]])
    """

    size: int
    d_out: int
    initializer: Initializer = field(default=standard_normal, repr=False)

    def __post_init__(self) -> None:
        affine.check(self, "size", "d_out")

    def init(self, rng: Rng | int, backend: Backend) -> Array:
        return affine.draw(self, rng, (self.d_out, self.size), backend)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not shape:
            raise self.wrong_inputs("(N, T, ...)", shape)
        return (*shape, self.d_out)

    def check_inputs(self, x: Array, checks: DeferredChecks) -> None:
        """Raise `InputError` unless x is of integers 0..size-1; some libraries wrap others."""
        require_array("x", x)
        self._require_integers(x)
        if math.prod(x.shape) == 0:
            return
        require_indices(f"x: {self!r} expected integers", x, self.size, checks)

    def input_dtype(self, like: Array) -> Any:
        return array_namespace(like).int64

    def forward(self, params: Array, x: Array, rng: Rng | None = None) -> tuple[Array, Array]:
        self.output_shape(x.shape[1:])
        self._require_integers(x)
        affine.require(self, params, (self.d_out, self.size))
        xp = array_namespace(x)
        indices = xp.astype(x, xp.int64)  # not every library takes entries by other integers
        return _columns(params, indices), indices

    def backward(
        self, params: Array, cache: Array, g: Array, wrt_input: bool = True
    ) -> tuple[None, EmbeddingStatistics]:
        return None, self._statistics(cache, g)

    def jvp(self, params: Array, cache: Array, dx: Array | None, dparams: Array) -> Array:
        return _columns(dparams, cache)

    def backward_jvp(
        self, params: Tree, cache: Tree, g: Array, dx: Array | None, dparams: Tree, dg: Array | None
    ) -> tuple[None, Array]:
        if dg is None:
            return None, array_namespace(params).zeros_like(params)
        return None, self._statistics(cache, dg).gradient()

    def _statistics(self, indices: Array, g: Array) -> EmbeddingStatistics:
        xp = array_namespace(g)
        n, t = indices.shape[0], math.prod(indices.shape[1:])
        vectors = g.shape[: g.ndim - indices.ndim - 1]  # (K,) or ()
        return EmbeddingStatistics(
            xp.reshape(indices, (n, t)), xp.reshape(g, (*vectors, n, t, self.d_out)), self.size
        )

    def _require_integers(self, x: Array) -> None:
        if not array_namespace(x).isdtype(x.dtype, "integral"):
            raise InputError(f"x: {self!r} expected an array of integers, got dtype {x.dtype}")


def _columns(w: Array, indices: Array) -> Array:
    """w[:, indices] with the columns' entries last, shape (*indices.shape, d_out)."""
    xp = array_namespace(w)
    rows = xp.take(w.T, xp.reshape(indices, (-1,)), axis=0)
    return xp.reshape(rows, (*indices.shape, w.shape[0]))
