"""The fully connected layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, Backend, Rng, append_ones, array_namespace
from kfac_np.errors import ShapeError
from kfac_np.layers.base import Layer
from kfac_np.layers.initializers import Initializer, glorot
from kfac_np.layers.parameters import draw_matrix, require_parameters
from kfac_np.statistics import AffineStatistics
from kfac_np.validation import plain_fields, require_callable, require_flag, require_sizes

__all__ = ["Dense"]


@final
@dataclass(frozen=True)
class Dense(Layer):
    """y = W̄ ā, with W̄ = [W b] and ā = [x; 1], on the last axis of x.

    Parameters are the one matrix W̄, shape (d_out, d_in + 1) with the bias as last column, or
    (d_out, d_in) without a bias. Axes of x between the first and the last share the weights.

    Parameters
    ----------
    d_in, d_out : int
        Number of inputs and of units.
    bias : bool
    initializer : callable
        (rng, d_in, d_out, backend) -> weights; the bias starts at zero.

    Examples
    --------
    >>> import numpy as np
    >>> W = np.asarray([[1.0, 2.0, 0.5]])
    >>> y, cache = Dense(2, 1).forward(W, np.asarray([[1.0, 1.0]]))
    >>> y
    array([[3.5]])
    """

    d_in: int
    d_out: int
    bias: bool = True
    initializer: Initializer = glorot

    def __post_init__(self) -> None:
        plain_fields(self)
        require_sizes("Dense", d_in=self.d_in, d_out=self.d_out)
        require_flag("Dense bias", self.bias)
        require_callable("Dense initializer", self.initializer)

    def __repr__(self) -> str:
        return f"Dense({self.d_in}, {self.d_out}{'' if self.bias else ', bias=False'})"

    def init(self, rng: Rng | int, backend: Backend) -> Array:
        shape = (self.d_out, self.d_in)
        return draw_matrix(self, self.initializer, rng, shape, backend, bias=self.bias)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not shape or shape[-1] != self.d_in:
            came = ", ".join(map(str, ("N", *shape)))
            raise ShapeError(f"{self!r}: expected inputs (N, ..., {self.d_in}), got ({came})")
        return (*shape[:-1], self.d_out)

    def forward(self, params: Array, x: Array) -> tuple[Array, Array]:
        self.output_shape(x.shape[1:])
        require_parameters(self, params, (self.d_out, self.d_in + self.bias))
        a = append_ones(x) if self.bias else x
        return on_last_axis(a, params.T), a

    def backward(
        self, params: Array, cache: Array, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, AffineStatistics]:
        dx = on_last_axis(g, params[:, : self.d_in]) if wrt_input else None
        return dx, affine_statistics(cache, g)

    def jvp(self, params: Array, cache: Array, dx: Array | None, dparams: Array) -> Array:
        dy = on_last_axis(cache, dparams.T)
        if dx is not None:
            dy += on_last_axis(dx, params[:, : self.d_in].T)
        return dy

    def backward_jvp(
        self,
        params: Array,
        cache: Array,
        g: Array,
        dx: Array | None,
        dparams: Array,
        dg: Array | None,
    ) -> tuple[Array, Array]:
        # The input derivative is g W and the gradient gᵀ ā: differentiate both products.
        ddx = on_last_axis(g, dparams[:, : self.d_in])
        dgradient = array_namespace(cache).zeros_like(params)
        if dg is not None:
            ddx += on_last_axis(dg, params[:, : self.d_in])
            dgradient += affine_statistics(cache, dg).gradient()
        if dx is not None:  # the appended 1 does not move
            dgradient[:, : self.d_in] += affine_statistics(dx, g).gradient()
        return ddx, dgradient


def affine_statistics(a: Array, g: Array) -> AffineStatistics:
    """Statistics of an affine map on the last axis: the axes after N become locations.

    Parameters
    ----------
    a : Array, shape (N, ..., d_in + 1)
    g : Array, shape ([K,] N, ..., d_out)
    """
    xp = array_namespace(a, g)
    n, t = a.shape[0], math.prod(a.shape[1:-1])
    vectors = g.shape[: g.ndim - a.ndim]  # (K,) or ()
    return AffineStatistics(
        xp.reshape(a, (n, t, a.shape[-1])), xp.reshape(g, (*vectors, n, t, g.shape[-1]))
    )


def on_last_axis(x: Array, m: Array) -> Array:
    """x @ m as one matrix product, however many axes x has."""
    if x.ndim == 2:
        return x @ m
    xp = array_namespace(x, m)
    rows = xp.reshape(x, (-1, x.shape[-1]))
    return xp.reshape(rows @ m, (*x.shape[:-1], m.shape[1]))
