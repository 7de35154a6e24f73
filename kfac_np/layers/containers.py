"""Layers made of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, Backend, Rng
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers.base import Layer
from kfac_np.trees import Tree

__all__ = ["Residual", "Sequential"]


@final
@dataclass(frozen=True, init=False)
class Sequential(Layer):
    """Layers one after another; parameters, caches and statistics are tuples of theirs.

    Parameters
    ----------
    *layers : Layer
        At least one.

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

    def __init__(self, *layers: Layer) -> None:
        if not layers:
            raise InputError("Sequential: expected at least one layer, got none")
        for i, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                raise InputError(f"Sequential: expected a Layer at {i}, got {type(layer).__name__}")
        object.__setattr__(self, "layers", layers)

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self.layers))})"

    def init(self, rng: Rng, backend: Backend) -> Tree:
        return tuple(layer.init(rng.child(i), backend) for i, layer in enumerate(self.layers))

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
        _require_one_each(self.layers, params)
        caches = []
        for i, (layer, p) in enumerate(zip(self.layers, params, strict=True)):
            try:
                x, cache = layer.forward(p, x)
            except InputError as error:
                raise error.within(f"layer {i}") from None
            caches.append(cache)
        return x, tuple(caches)

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
    """y = x + f(x); parameters, cache and statistics are those of f.

    Parameters
    ----------
    inner : Layer
        f; its output has the shape of its input.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Identity
    >>> Residual(Identity()).forward((), np.ones((1, 2)))[0]
    array([[2., 2.]])
    """

    inner: Layer

    def init(self, rng: Rng, backend: Backend) -> Tree:
        return self.inner.init(rng, backend)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        try:
            out = self.inner.output_shape(shape)
        except InputError as error:
            raise error.within("Residual") from None
        if out != shape:
            raise ShapeError(f"Residual: expected the inner output shape {shape}, got {out}")
        return out

    def forward(self, params: Tree, x: Array) -> tuple[Array, Tree]:
        self.output_shape(x.shape[1:])
        y, cache = self.inner.forward(params, x)
        return x + y, cache

    def backward(
        self, params: Tree, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        dx, statistics = self.inner.backward(params, cache, g, wrt_input)
        return (None if dx is None else g + dx), statistics

    def jvp(self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree) -> Array | None:
        return _add(dx, self.inner.jvp(params, cache, dx, dparams))

    def backward_jvp(
        self,
        params: Tree,
        cache: Tree,
        g: Array,
        dx: Array | None,
        dparams: Tree,
        dg: Array | None,
    ) -> tuple[Array | None, Tree]:
        ddx, dgradient = self.inner.backward_jvp(params, cache, g, dx, dparams, dg)
        return _add(dg, ddx), dgradient

    def take(self, cache: Tree, rows: slice) -> Tree:
        return self.inner.take(cache, rows)

    def backward_size(self, shape: tuple[int, ...]) -> int:
        return self.inner.backward_size(shape)


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
