"""A layer under test: its outputs, derivatives and random directions at a point."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import final

from kfac_np import trees
from kfac_np.backend import Array, Backend, Rng, array_namespace
from kfac_np.layers import Layer
from kfac_np.testing._tools import random_like, require
from kfac_np.trees import Tree

__all__ = [
    "Subject",
    "gradients",
    "inner",
    "moved",
    "only",
    "or_zeros",
    "wide",
    "zeros_or_none",
]


@final
@dataclass(frozen=True, eq=False)
class Subject:
    """A layer at a point, with random directions."""

    layer: Layer
    params: Tree
    x: Array
    rng: Rng

    @cached_property
    def forwarded(self) -> tuple[Array, Tree]:
        return self.layer.forward(self.params, self.x)

    @property
    def y(self) -> Array:
        return self.forwarded[0]

    @property
    def cache(self) -> Tree:
        return self.forwarded[1]

    @property
    def whole(self) -> bool:
        """Whether inputs are integers, which cannot move."""
        return not array_namespace(self.x).isdtype(self.x.dtype, "real floating")

    @cached_property
    def backend(self) -> Backend:
        """Where everything lives, and the dtype of everything but integer inputs."""
        place = Backend.of(self.x)
        return Backend.of(place.xp.zeros((1,), dtype=place.xp.float64, device=place.device))

    @cached_property
    def dx(self) -> Array | None:
        return None if self.whole else random_like(self.rng.child("dx"), self.x)

    @cached_property
    def dparams(self) -> Tree:
        return random_like(self.rng.child("dparams"), self.params)

    @cached_property
    def g(self) -> Array:
        return random_like(self.rng.child("g"), self.y)

    @cached_property
    def dg(self) -> Array:
        return random_like(self.rng.child("dg"), self.y)

    def vectors(self, number: int) -> Array:
        shape = (number, *self.y.shape)
        return self.rng.child("vectors").normal(shape, Backend.of(self.y))

    def value(self, params: Tree, x: Array) -> Array:
        return self.layer.forward(params, x)[0]

    def jvp(self, dx: Array | None, dparams: Tree) -> Array:
        return or_zeros(self.layer.jvp(self.params, self.cache, dx, dparams), self.y)

    def backward(self, g: Array) -> tuple[Array | None, Tree]:
        """Input derivative and parameter gradient."""
        return self.backward_at(self.params, self.cache, g)

    def backward_at(self, params: Tree, cache: Tree, g: Array) -> tuple[Array | None, Tree]:
        """The same elsewhere; of integer inputs the derivative is None, of others it is not."""
        dx, statistics = self.layer.backward(params, cache, g)
        if self.whole:
            require(dx is None, "backward returned a derivative with respect to integers")
        else:
            require(dx is not None, "backward returned no input derivative, though asked for one")
        return dx, gradients(statistics)


def gradients(statistics: Tree) -> Tree:
    return trees.tree_map(lambda s: s.gradient(), statistics)


def or_zeros(x: Array | None, like: Array) -> Array:
    return array_namespace(like).zeros_like(like) if x is None else x


def moved(x: Tree, step: float, dx: Tree) -> Tree:
    """x + step · dx; None does not move."""
    return x if dx is None else trees.axpy(step, dx, x)


def zeros_or_none(x: Array | None) -> Array | None:
    return None if x is None else array_namespace(x).zeros_like(x)


def inner(x: Tree, y: Tree) -> tuple[float, float]:
    """The inner product, and the sum of the absolute values of its terms."""
    xp_sum, absolute = 0.0, 0.0
    for a, b in zip(trees.leaves(x), trees.leaves(y), strict=True):
        if a is None or b is None:  # no derivative, or no tangent
            continue
        xp = array_namespace(a)
        xp_sum += float(xp.sum(a * b))
        absolute += float(xp.sum(xp.abs(a * b)))
    return xp_sum, absolute


def only(g: Array, n: int) -> Array:
    """g of example n, zero for all others."""
    out = array_namespace(g).zeros_like(g)
    out[n, ...] = g[n, ...]
    return out


def wide(tree: Tree) -> Tree:
    def leaf(x: Array | None) -> Array | None:
        return None if x is None else array_namespace(x).astype(x, array_namespace(x).float64)

    return trees.tree_map(leaf, tree)
