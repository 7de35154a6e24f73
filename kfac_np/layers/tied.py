"""Layers that are used several times with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from kfac_np import trees
from kfac_np.backend import Array, Backend, DeferredChecks, Rng
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers.base import Layer
from kfac_np.layers.uses import merge_trees, require_uncoupled, sum_trees
from kfac_np.trees import Tree
from kfac_np.validation import is_integer, plain_fields

__all__ = ["Tied"]


@final
@dataclass(frozen=True)
class Tied(Layer):
    """Layers applied in an order in which each may come several times, with the same weights.

    Parameters are a tuple with one entry for each distinct layer, used once or often; caches have
    one for each use. Statistics of several uses are those of one parameter with more locations
    (`merge_uses`).

    Parameters
    ----------
    layers : tuple of Layer
        The distinct ones. Those with batch statistics may be used once only.
    order : tuple of int
        Which layer comes when; every layer comes at least once.

    Examples
    --------
    >>> from kfac_np.backend import get_backend
    >>> from kfac_np.layers import Dense, Tanh
    >>> net = Tied((Dense(8, 8), Tanh()), order=(0, 1, 0, 1, 0, 1))
    >>> len(net.init(Rng(0), get_backend()))
    2
    >>> Tied((Dense(8, 8), Tanh()), order=(0, 0))
    Traceback (most recent call last):
    kfac_np.errors.InputError: Tied: expected every layer in the order, got (0, 0) for 2 layers
    """

    layers: tuple[Layer, ...]
    order: tuple[int, ...]

    def __post_init__(self) -> None:
        plain_fields(self)
        layers, order = self.layers, self.order
        if not isinstance(layers, tuple) or not all(isinstance(layer, Layer) for layer in layers):
            raise InputError(f"Tied: expected a tuple of layers, got {layers!r}")
        whole = isinstance(order, tuple) and all(map(is_integer, order))
        if not whole or any(not 0 <= i < len(layers) for i in order):
            raise InputError(f"Tied: expected order to be of 0..{len(layers) - 1}, got {order!r}")
        if not layers or set(order) != set(range(len(layers))):
            raise InputError(
                f"Tied: expected every layer in the order, got {order} for {len(layers)} layers"
            )
        for i, layer in enumerate(layers):
            if order.count(i) > 1:
                require_uncoupled("Tied", layer, order.count(i))

    def __repr__(self) -> str:
        return f"Tied({self.layers!r}, order={self.order})"

    def init(self, rng: Rng | int, backend: Backend) -> Tree:
        streams = Rng.of(rng).spawn()
        return tuple(layer.init(streams.child(i), backend) for i, layer in enumerate(self.layers))

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        for use, i in enumerate(self.order):
            try:
                shape = self.layers[i].output_shape(shape)
            except InputError as error:
                raise error.within(f"use {use} of layer {i}") from None
        return shape

    def backward_size(self, shape: tuple[int, ...]) -> int:
        total = 0
        for i in self.order:
            total += self.layers[i].backward_size(shape)
            shape = self.layers[i].output_shape(shape)
        return total

    def forward(self, params: Tree, x: Array) -> tuple[Array, Tree]:
        return self._chain(params, x, lambda use, layer, p, h: layer.forward(p, h))

    def forward_random(self, params: Tree, x: Array, rng: Rng) -> tuple[Array, Tree]:
        streams = rng.spawn()
        return self._chain(
            params, x, lambda use, layer, p, h: layer.forward_random(p, h, streams.child(use))
        )

    def evaluation(self, params: Tree, x: Array) -> tuple[Layer, Array]:
        x, found = self._chain(params, x, lambda use, layer, p, h: layer.evaluation(p, h)[::-1])
        layers = list(self.layers)
        for i, layer in zip(self.order, found, strict=True):
            layers[i] = layer  # the same for every use: none that comes often has batch statistics
        return Tied(tuple(layers), self.order), x

    def _chain(
        self, params: Tree, x: Array, step: Callable[[int, Layer, Tree, Array], tuple[Array, Any]]
    ) -> tuple[Array, tuple[Any, ...]]:
        """Output of the last use, and what `step` returns besides for each of them."""
        if not isinstance(params, tuple | list) or len(params) != len(self.layers):
            came = len(params) if isinstance(params, tuple | list) else type(params).__name__
            raise ShapeError(f"Tied: expected parameters for {len(self.layers)} layers, got {came}")
        found = []
        for use, i in enumerate(self.order):
            try:
                x, other = step(use, self.layers[i], params[i], x)
            except InputError as error:
                raise error.within(f"use {use} of layer {i}") from None
            found.append(other)
        return x, tuple(found)

    @property
    def couples_examples(self) -> bool:
        return any(layer.couples_examples for layer in self.layers)

    def check_inputs(self, x: Array, checks: DeferredChecks) -> None:
        self.layers[self.order[0]].check_inputs(x, checks)

    def input_dtype(self, like: Array) -> Any:
        return self.layers[self.order[0]].input_dtype(like)

    def at(self, path: str) -> Layer:
        head, _, rest = path.partition(".")
        return self.layers[int(head)].at(rest) if head else self

    def backward(
        self, params: Tree, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        # Below the first use of a parameter nothing asks for a derivative.
        uses = len(self.order)
        first = 0
        while not wrt_input and first < uses and not trees.leaves(params[self.order[first]]):
            first += 1
        statistics: list[list[Tree]] = [[] for _ in self.layers]
        dx: Array | None = g
        for use in reversed(range(first, uses)):
            assert dx is not None  # asked for by the use above
            i = self.order[use]
            further = wrt_input or use > first
            dx, s = self.layers[i].backward(params[i], cache[use], dx, further)
            statistics[i].insert(0, s)
        merged = [
            merge_trees(uses) if uses else p  # p has no parameters then
            for uses, p in zip(statistics, params, strict=True)
        ]
        return (dx if wrt_input else None), tuple(merged)

    def jvp(self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree) -> Array | None:
        for i, c in zip(self.order, cache, strict=True):
            dx = self.layers[i].jvp(params[i], c, dx, dparams[i])
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
        tangents = [dx]  # of each use's input
        for i, c in zip(self.order, cache, strict=True):
            tangents.append(self.layers[i].jvp(params[i], c, tangents[-1], dparams[i]))
        dgradients: list[list[Tree]] = [[] for _ in self.layers]
        for use in reversed(range(len(self.order))):
            i = self.order[use]
            layer, p, c = self.layers[i], params[i], cache[use]
            next_dg, dgradient = layer.backward_jvp(p, c, g, tangents[use], dparams[i], dg)
            dgradients[i].append(dgradient)
            if use > 0:
                next_g, _ = layer.backward(p, c, g)
                assert next_g is not None
                g = next_g
            dg = next_dg
        return dg, tuple(map(sum_trees, dgradients))

    def take(self, cache: Tree, rows: slice) -> Tree:
        return tuple(self.layers[i].take(c, rows) for i, c in zip(self.order, cache, strict=True))
