"""Dropout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, Backend, Rng, array_namespace
from kfac_np.layers.base import Layer
from kfac_np.trees import Tree
from kfac_np.validation import plain_fields, require_in

__all__ = ["Dropout"]


@final
@dataclass(frozen=True)
class Dropout(Layer):
    """y = m x / (1 - rate) with m = 0 with probability `rate`, else 1, in training; y = x else.

    Training is `forward_random`, which draws a mask for every number of x; `forward` draws
    nothing. The mask is the cache, so that derivatives, quadratic forms and parts of a batch all
    see the function that was evaluated. One `Rng` stands for one mask, however often it is used:
    an optimiser draws a new one each step, and takes the same for the reduction ratio.

    Parameters
    ----------
    rate : float
        In [0, 1).

    References
    ----------
    Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting",
    §10 (scaled in training, so that nothing changes after it).

    Examples
    --------
    >>> import numpy as np
    >>> layer, x = Dropout(0.5), np.ones((1, 6))
    >>> layer.forward_random((), x, Rng(0))[0]
    array([[0., 2., 2., 2., 2., 0.]])
    >>> layer.forward((), x)[0]
    array([[1., 1., 1., 1., 1., 1.]])
    """

    rate: float

    def __post_init__(self) -> None:
        plain_fields(self)
        require_in("Dropout rate", self.rate, "[0, 1)")

    def __repr__(self) -> str:
        return f"Dropout({self.rate!r})"

    def init(self, rng: Rng, backend: Backend) -> Tree:
        return ()

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def forward(self, params: Tree, x: Array) -> tuple[Array, Tree]:
        return x, ()

    def forward_random(self, params: Tree, x: Array, rng: Rng) -> tuple[Array, Tree]:
        if self.rate == 0.0:
            return x, ()
        xp = array_namespace(x)
        kept = rng.spawn().child("mask").uniform(x.shape, Backend.of(x)) >= self.rate
        mask = xp.astype(kept, x.dtype) * (1.0 / (1.0 - self.rate))
        return x * mask, mask

    def backward(
        self, params: Tree, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        return (_masked(cache, g) if wrt_input else None), ()

    def jvp(self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree) -> Array | None:
        return None if dx is None else _masked(cache, dx)

    def backward_jvp(
        self,
        params: Tree,
        cache: Tree,
        g: Array,
        dx: Array | None,
        dparams: Tree,
        dg: Array | None,
    ) -> tuple[Array | None, Tree]:
        return (None if dg is None else _masked(cache, dg)), ()


def _masked(mask: Tree, x: Array) -> Array:
    """x times the mask; the empty cache `()` is that of a pass without one."""
    return x if isinstance(mask, tuple) else x * mask
