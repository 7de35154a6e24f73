"""The fully connected layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from kfac_np.backend import Array, Backend, Rng, append_ones, array_namespace
from kfac_np.layers import affine
from kfac_np.layers.base import Layer
from kfac_np.layers.initializers import Initializer, glorot
from kfac_np.trees import Tree

__all__ = ["Dense"]


@final
@dataclass(frozen=True, repr=False)
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
    >>> Dense(2, 1).forward(np.asarray([[1.0, 2.0, 0.5]]), np.ones((1, 2)))[0]
    array([[3.5]])
    """

    d_in: int
    d_out: int
    bias: bool = True
    initializer: Initializer = field(default=glorot, repr=False)

    def __post_init__(self) -> None:
        affine.check(self, "d_in", "d_out")

    def init(self, rng: Rng | int, backend: Backend) -> Array:
        return affine.draw(self, rng, (self.d_out, self.d_in), backend, self.bias)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not shape or shape[-1] != self.d_in:
            raise self.wrong_inputs(f"(N, ..., {self.d_in})", shape)
        return (*shape[:-1], self.d_out)

    def forward(self, params: Array, x: Array, rng: Rng | None = None) -> tuple[Array, Array]:
        self.output_shape(x.shape[1:])
        affine.require(self, params, (self.d_out, self.d_in + self.bias))
        a = append_ones(x) if self.bias else x
        return affine.product(a, params.T), a

    def backward(
        self, params: Array, cache: Array, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        dx = affine.product(g, params[:, : self.d_in]) if wrt_input else None
        return dx, affine.statistics(cache, g)

    def jvp(self, params: Array, cache: Array, dx: Array | None, dparams: Array) -> Array:
        dy = affine.product(cache, dparams.T)
        if dx is not None:
            dy += affine.product(dx, params[:, : self.d_in].T)
        return dy

    def backward_jvp(
        self, params: Tree, cache: Tree, g: Array, dx: Array | None, dparams: Tree, dg: Array | None
    ) -> tuple[Array, Array]:
        # The input derivative is g W and the gradient gᵀ ā: differentiate both products.
        ddx = affine.product(g, dparams[:, : self.d_in])
        dgradient = array_namespace(cache).zeros_like(params)
        if dg is not None:
            ddx += affine.product(dg, params[:, : self.d_in])
            dgradient += affine.statistics(cache, dg).gradient()
        if dx is not None:  # the appended 1 does not move
            dgradient[:, : self.d_in] += affine.statistics(dx, g).gradient()
        return ddx, dgradient
