"""Layers made of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

from kfac_np.backend import Array, Backend, DeferredChecks, Rng
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers.base import Layer
from kfac_np.trees import Tree
from kfac_np.validation import require_instance

__all__ = ["Residual", "Sequential"]


@final
@dataclass(frozen=True, init=False)
class Sequential(Layer):
    """Layers one after another; parameters, caches and statistics are tuples of theirs.

    Parameters
    ----------
    *layers : Layer
        At least one; a list or a tuple of them will do, too.

    Examples
    --------
    >>> from kfac_np.layers import Dense, Tanh
    >>> net = Sequential(Dense(4, 3), Tanh(), Dense(3, 2))
    >>> net.output_shape((4,))
    (2,)
    >>> net.output_shape((5,))
    Traceback (most recent call last):
    kfac_np.errors.ShapeError: layer 0: Dense(4, 3): expected inputs (N, ..., 4), got (N, 5)
    """

    layers: tuple[Layer, ...]

    def __init__(self, *layers: Layer | Sequence[Layer]) -> None:
        if len(layers) == 1 and isinstance(layers[0], list | tuple):
            layers = tuple(layers[0])
        if not layers:
            raise InputError("Sequential: expected at least one layer, got none")
        for i, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                raise InputError(f"Sequential: expected a Layer at {i}, got {type(layer).__name__}")
        object.__setattr__(self, "layers", layers)

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self.layers))})"

    def init(self, rng: Rng | int, backend: Backend) -> Tree:
        streams = Rng.of(rng).spawn()
        return tuple(layer.init(streams.child(i), backend) for i, layer in enumerate(self.layers))

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        for i, layer in enumerate(self.layers):
            try:
                shape = layer.output_shape(shape)
            except InputError as error:
                raise error.within(f"layer {i}") from None
        return shape

    def backward_size(self, shape: tuple[int, ...]) -> int:
        total = 0
        for layer in self.layers:
            total += layer.backward_size(shape)
            shape = layer.output_shape(shape)
        return total

    def forward(self, params: Tree, x: Array) -> tuple[Array, Tree]:
        return self._chain(params, x, lambda i, p, h: self.layers[i].forward(p, h))

    def forward_random(self, params: Tree, x: Array, rng: Rng) -> tuple[Array, Tree]:
        streams = rng.spawn()
        return self._chain(
            params, x, lambda i, p, h: self.layers[i].forward_random(p, h, streams.child(i))
        )

    def evaluation(self, params: Tree, x: Array) -> tuple[Layer, Array]:
        x, layers = self._chain(params, x, lambda i, p, h: self.layers[i].evaluation(p, h)[::-1])
        return Sequential(*layers), x

    def _chain(
        self, params: Tree, x: Array, step: Callable[[int, Tree, Array], tuple[Array, Any]]
    ) -> tuple[Array, tuple[Any, ...]]:
        """Output of the last layer, and what `step` returns besides for each of them."""
        _require_one_each(self.layers, params)
        found = []
        for i, p in enumerate(params):
            try:
                x, other = step(i, p, x)
            except InputError as error:
                raise error.within(f"layer {i}") from None
            found.append(other)
        return x, tuple(found)

    @property
    def couples_examples(self) -> bool:
        return any(layer.couples_examples for layer in self.layers)

    def check_inputs(self, x: Array, checks: DeferredChecks) -> None:
        self.layers[0].check_inputs(x, checks)

    def input_dtype(self, like: Array) -> Any:
        return self.layers[0].input_dtype(like)

    def at(self, path: str) -> Layer:
        head, _, rest = path.partition(".")
        return self.layers[int(head)].at(rest) if head else self

    def backward(
        self, params: Tree, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        # Below the first layer with parameters nothing asks for a derivative.
        first = 0
        while not wrt_input and first < len(self.layers) and not _has_leaves(params[first]):
            first += 1
        statistics = []
        dx: Array | None = g
        for i in reversed(range(first, len(self.layers))):
            assert dx is not None  # asked for by the layer above
            dx, s = self.layers[i].backward(params[i], cache[i], dx, wrt_input or i > first)
            statistics.append(s)
        return (dx if wrt_input else None), (*params[:first], *reversed(statistics))

    def jvp(self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree) -> Array | None:
        for layer, p, c, dp in zip(self.layers, params, cache, dparams, strict=True):
            dx = layer.jvp(p, c, dx, dp)
        return dx

    def backward_jvp(
        self,
        params: Tree,
        cache: Tree,
        g: Array,
        dx: Array | None,
        dparams: Tree,
        dg: Array | None,
    ) -> tuple[Array | None, Tree]:
        tangents = [dx]  # of each layer's input
        for layer, p, c, dp in zip(self.layers, params, cache, dparams, strict=True):
            tangents.append(layer.jvp(p, c, tangents[-1], dp))
        dgradients = []
        for i in reversed(range(len(self.layers))):
            layer, p, c, dp = self.layers[i], params[i], cache[i], dparams[i]
            next_dg, dgradient = layer.backward_jvp(p, c, g, tangents[i], dp, dg)
            dgradients.append(dgradient)
            if i > 0:
                next_g, _ = layer.backward(p, c, g)
                assert next_g is not None
                g = next_g
            dg = next_dg
        return dg, tuple(reversed(dgradients))

    def take(self, cache: Tree, rows: slice) -> Tree:
        return tuple(layer.take(c, rows) for layer, c in zip(self.layers, cache, strict=True))


@final
@dataclass(frozen=True)
class Residual(Layer):
    """y = x + f(x), or y = h(x) + f(x) with a shortcut h.

    Parameters, cache and statistics are those of f; with a shortcut, pairs (f's, h's).

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

    def init(self, rng: Rng | int, backend: Backend) -> Tree:
        rng = Rng.of(rng)
        if self.shortcut is None:
            return self.inner.init(rng, backend)
        streams = rng.spawn()
        children = streams.child("inner"), streams.child("shortcut")
        return tuple(
            branch.init(child, backend)
            for branch, child in zip((self.inner, self.shortcut), children, strict=True)
        )

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        try:
            out = self.inner.output_shape(shape)
            expected = shape if self.shortcut is None else self.shortcut.output_shape(shape)
        except InputError as error:
            raise error.within("Residual") from None
        if out != expected:
            raise ShapeError(f"Residual: expected the inner output shape {expected}, got {out}")
        return out

    def backward_size(self, shape: tuple[int, ...]) -> int:
        size = self.inner.backward_size(shape)
        return size if self.shortcut is None else size + self.shortcut.backward_size(shape)

    def forward(self, params: Tree, x: Array) -> tuple[Array, Tree]:
        return self._sum(params, x, lambda layer, key, p: layer.forward(p, x))

    def forward_random(self, params: Tree, x: Array, rng: Rng) -> tuple[Array, Tree]:
        streams = rng.spawn()
        return self._sum(
            params, x, lambda layer, key, p: layer.forward_random(p, x, streams.child(key))
        )

    def evaluation(self, params: Tree, x: Array) -> tuple[Layer, Array]:
        y, layers = self._sum(params, x, lambda layer, key, p: layer.evaluation(p, x)[::-1])
        return Residual(layers) if self.shortcut is None else Residual(*layers), y

    def _sum(
        self, params: Tree, x: Array, branch: Callable[[Layer, str, Tree], tuple[Array, Any]]
    ) -> tuple[Array, Any]:
        """Sum of the branches' outputs, and what `branch` returns besides."""
        self.output_shape(x.shape[1:])
        if self.shortcut is None:
            y, found = branch(self.inner, "inner", params)
            return x + y, found
        p, q = self._pair(params)
        (y, found), (short, other) = (
            branch(self.inner, "inner", p),
            branch(self.shortcut, "shortcut", q),
        )
        return short + y, (found, other)

    def backward(
        self, params: Tree, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        if self.shortcut is None:
            dx, statistics = self.inner.backward(params, cache, g, wrt_input)
            return (None if dx is None else g + dx), statistics
        dx, statistics = self.inner.backward(params[0], cache[0], g, wrt_input)
        short, other = self.shortcut.backward(params[1], cache[1], g, wrt_input)
        return _add(dx, short), (statistics, other)

    def jvp(self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree) -> Array | None:
        if self.shortcut is None:
            return _add(dx, self.inner.jvp(params, cache, dx, dparams))
        short = self.shortcut.jvp(params[1], cache[1], dx, dparams[1])
        return _add(short, self.inner.jvp(params[0], cache[0], dx, dparams[0]))

    def backward_jvp(
        self,
        params: Tree,
        cache: Tree,
        g: Array,
        dx: Array | None,
        dparams: Tree,
        dg: Array | None,
    ) -> tuple[Array | None, Tree]:
        if self.shortcut is None:
            ddx, dgradient = self.inner.backward_jvp(params, cache, g, dx, dparams, dg)
            return _add(dg, ddx), dgradient
        ddx, dgradient = self.inner.backward_jvp(params[0], cache[0], g, dx, dparams[0], dg)
        short, other = self.shortcut.backward_jvp(params[1], cache[1], g, dx, dparams[1], dg)
        return _add(ddx, short), (dgradient, other)

    def take(self, cache: Tree, rows: slice) -> Tree:
        if self.shortcut is None:
            return self.inner.take(cache, rows)
        return self.inner.take(cache[0], rows), self.shortcut.take(cache[1], rows)

    @property
    def couples_examples(self) -> bool:
        return any(
            layer.couples_examples for layer in (self.inner, self.shortcut) if layer is not None
        )

    def check_inputs(self, x: Array, checks: DeferredChecks) -> None:
        self.inner.check_inputs(x, checks)

    def input_dtype(self, like: Array) -> Any:
        return self.inner.input_dtype(like)

    def at(self, path: str) -> Layer:
        if self.shortcut is None:
            return self.inner.at(path)
        head, _, rest = path.partition(".")
        return {"0": self.inner, "1": self.shortcut, "": self}[head].at(rest)

    def _pair(self, params: Tree) -> Tree:
        if not isinstance(params, tuple) or len(params) != 2:
            raise ShapeError(
                f"Residual: expected a pair of parameters (inner, shortcut), got {params!r:.80}"
            )
        return params


def _add(x: Array | None, y: Array | None) -> Array | None:
    if x is None or y is None:
        return y if x is None else x
    return x + y


def _has_leaves(tree: Tree) -> bool:
    if isinstance(tree, dict):
        return any(map(_has_leaves, tree.values()))
    return any(map(_has_leaves, tree)) if isinstance(tree, tuple | list) else True


def _require_one_each(layers: tuple[Layer, ...], params: Tree) -> None:
    if not isinstance(params, tuple | list) or len(params) != len(layers):
        came = len(params) if isinstance(params, tuple | list) else type(params).__name__
        raise ShapeError(f"Sequential: expected parameters for {len(layers)} layers, got {came}")
