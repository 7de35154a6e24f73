"""Layers side by side, added up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

from kfac_np.backend import Array, Backend, Rng
from kfac_np.errors import ShapeError
from kfac_np.layers.base import Layer
from kfac_np.layers.containers import Container, inside
from kfac_np.trees import Tree
from kfac_np.validation import require_instance

__all__ = ["Residual"]

BRANCHES = "inner", "shortcut"


@final
@dataclass(frozen=True, repr=False)
class Residual(Container):
    """y = x + f(x), or y = h(x) + f(x) with a shortcut h.

    Parameters and statistics are those of f; with a shortcut, pairs (f's, h's).

    Parameters
    ----------
    inner : Layer
        f; its output has the shape of its input, or of the shortcut's output.
    shortcut : Layer, optional
        h, for branches that change the shape.

    References
    ----------
    He et al. 2016, arXiv:1512.03385, eqs. 1 and 2.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Dense, Identity
    >>> Residual(Identity()).forward((), np.ones((1, 2)))[0]
    array([[2., 2.]])
    >>> Residual(Dense(2, 3), shortcut=Dense(2, 3, bias=False)).output_shape((2,))
    (3,)
    """

    inner: Layer
    shortcut: Layer | None = None

    def __post_init__(self) -> None:
        require_instance("Residual inner", self.inner, Layer)
        require_instance("Residual shortcut", self.shortcut, Layer, optional=True)

    def __repr__(self) -> str:
        shortcut = "" if self.shortcut is None else f", shortcut={self.shortcut!r}"
        return f"Residual(inner={self.inner!r}{shortcut})"

    @property
    def children(self) -> Tree:
        return self.inner if self.shortcut is None else (self.inner, self.shortcut)

    def uses(self) -> Sequence[Layer]:
        return self._each(self.children)

    def _each(self, tree: Tree) -> Sequence[Tree]:
        """A tree in the structure of the parameters, cut into those of the branches."""
        return (tree,) if self.shortcut is None else tree

    def _joined(self, each: Sequence[Tree]) -> Tree:
        """The inverse of `_each`."""
        return each[0] if self.shortcut is None else tuple(each)

    def _sum(
        self, straight: Array | None, branches: Iterable[tuple[Array | None, Any]]
    ) -> tuple[Any, tuple[Any, ...]]:
        """h + f, with `straight` for h if there is no shortcut; and what comes beside each."""
        arrays, others = zip(*branches, strict=True)
        return _add(straight if self.shortcut is None else arrays[1], arrays[0]), others

    def init(self, rng: Rng | int, backend: Backend) -> Tree:
        rng = Rng.of(rng)
        if self.shortcut is None:
            return self.inner.init(rng, backend)
        streams = rng.spawn()
        inner, shortcut = map(streams.child, BRANCHES)
        return self.inner.init(inner, backend), self.shortcut.init(shortcut, backend)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        with inside("Residual"):
            out = self.inner.output_shape(shape)
            expected = shape if self.shortcut is None else self.shortcut.output_shape(shape)
        if out != expected:
            raise ShapeError(f"Residual: expected the inner output shape {expected}, got {out}")
        return out

    def backward_size(self, shape: tuple[int, ...]) -> int:
        return sum(layer.backward_size(shape) for layer in self.uses())

    def forward(self, params: Tree, x: Array, rng: Rng | None = None) -> tuple[Array, Tree]:
        self._require(params, x)
        streams = None if rng is None else rng.spawn()
        found = []
        for key, layer, p in zip(BRANCHES, self.uses(), self._each(params), strict=False):
            stream = None if streams is None else streams.child(key)
            found.append(layer.forward(p, x, stream))
        return self._sum(x, found)

    def evaluation(self, params: Tree, x: Array) -> tuple[Layer, Array]:
        self._require(params, x)
        each = zip(self.uses(), self._each(params), strict=True)
        y, layers = self._sum(x, [layer.evaluation(p, x)[::-1] for layer, p in each])
        return Residual(*layers), y

    def backward(
        self, params: Tree, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        each = zip(self.uses(), self._each(params), cache, strict=True)
        found = [layer.backward(p, c, g, wrt_input) for layer, p, c in each]
        dx, statistics = self._sum(g if wrt_input else None, found)
        return dx, self._joined(statistics)

    def jvp(self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree) -> Array | None:
        each = zip(self.uses(), self._each(params), cache, self._each(dparams), strict=True)
        return self._sum(dx, [(layer.jvp(p, c, dx, dp), ()) for layer, p, c, dp in each])[0]

    def backward_jvp(
        self, params: Tree, cache: Tree, g: Array, dx: Array | None, dparams: Tree, dg: Array | None
    ) -> tuple[Array | None, Tree]:
        each = zip(self.uses(), self._each(params), cache, self._each(dparams), strict=True)
        found = [layer.backward_jvp(p, c, g, dx, dp, dg) for layer, p, c, dp in each]
        ddx, dgradients = self._sum(dg, found)
        return ddx, self._joined(dgradients)

    def _require(self, params: Tree, x: Array) -> None:
        self.output_shape(x.shape[1:])
        if self.shortcut is not None:
            self._require_one_each(params)


def _add(x: Array | None, y: Array | None) -> Array | None:
    if x is None or y is None:
        return y if x is None else x
    return x + y
