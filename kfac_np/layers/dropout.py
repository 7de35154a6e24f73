"""Dropout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, Backend, Rng, array_namespace
from kfac_np.layers.base import Parameterless
from kfac_np.trees import Tree
from kfac_np.validation import plain_fields, require_in

__all__ = ["Dropout"]


@final
@dataclass(frozen=True, repr=False)
class Dropout(Parameterless):
    """y = m x / (1 - rate) with m = 0 with probability `rate`, else 1, in training; y = x else.

    Training is `forward` with an `Rng`, from which a mask is drawn for every number of x; without
    one nothing is drawn. The mask is the cache, so that derivatives, quadratic forms and parts of a
    batch all see the function that was evaluated. One `Rng` stands for one mask, however often it
    is used: an optimiser draws a new one each step, and takes the same for the reduction ratio.

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
    >>> layer.forward((), x, Rng(0))[0]
    array([[0., 2., 2., 2., 2., 0.]])
    >>> layer.forward((), x)[0]
    array([[1., 1., 1., 1., 1., 1.]])
    """

    rate: float

    def __post_init__(self) -> None:
        plain_fields(self)
        require_in("Dropout rate", self.rate, "[0, 1)")

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def forward(self, params: Tree, x: Array, rng: Rng | None = None) -> tuple[Array, Tree]:
        if rng is None or self.rate == 0.0:
            return x, ()
        xp = array_namespace(x)
        kept = rng.spawn().child("mask").uniform(x.shape, Backend.of(x)) >= self.rate
        mask = xp.astype(kept, x.dtype) * (1.0 / (1.0 - self.rate))
        return x * mask, mask

    def _tangent(self, cache: Tree, dx: Array) -> Array:
        return dx if isinstance(cache, tuple) else dx * cache  # `()` is that of a pass without mask

    def _transpose(self, cache: Tree, g: Array) -> Array:
        return self._tangent(cache, g)
