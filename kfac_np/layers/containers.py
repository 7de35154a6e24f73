"""Layers one after another, each used once or several times."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

from kfac_np import trees
from kfac_np.backend import Array, Backend, DeferredChecks, Rng
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers.base import Layer
from kfac_np.layers.uses import merge_trees, require_uncoupled, sum_trees
from kfac_np.trees import Tree
from kfac_np.validation import is_integer, plain_fields

__all__ = ["Sequential", "Tied"]


@contextmanager
def inside(place: str) -> Iterator[None]:
    """Put `place` before the message of an `InputError` that is raised in this context."""
    try:
        yield
    except InputError as error:
        raise error.within(place) from None


class Container(Layer):
    """A layer made of layers: a subclass says which `children` it has, and how it uses them.

    Inputs go to the layer that is used first as they are. The cache is a tuple of the uses' caches.
    """

    @abstractmethod
    def uses(self) -> Sequence[Layer]:
        """The children in the order of their uses; one may come several times."""

    def check_inputs(self, x: Array, checks: DeferredChecks) -> None:
        self.uses()[0].check_inputs(x, checks)

    def input_dtype(self, like: Array) -> Any:
        return self.uses()[0].input_dtype(like)

    def take(self, cache: Tree, rows: slice) -> Tree:
        return tuple(layer.take(c, rows) for layer, c in zip(self.uses(), cache, strict=True))

    def _require_one_each(self, params: Tree) -> None:
        number = len(self.children)
        if not isinstance(params, tuple | list) or len(params) != number:
            came = len(params) if isinstance(params, tuple | list) else type(params).__name__
            raise ShapeError(
                f"{type(self).__name__}: expected parameters for {number} layers, got {came}"
            )


class Chain(Container):
    """Layers one after another; each may be used several times, with the same parameters.

    Parameters and statistics are tuples with an entry for each layer, caches with one for each use.
    """

    layers: tuple[Layer, ...]

    @abstractmethod
    def _order(self) -> Sequence[int]:
        """Which layer comes when."""

    @abstractmethod
    def _of(self, layers: Iterable[Layer]) -> Chain:
        """Other layers in the same order."""

    @property
    def children(self) -> tuple[Layer, ...]:
        return self.layers

    def uses(self) -> Sequence[Layer]:
        return [self.layers[i] for i in self._order()]

    def _place(self, use: int, i: int) -> str:
        once = len(self._order()) == len(self.layers)
        return f"layer {i}" if once else f"use {use} of layer {i}"

    def init(self, rng: Rng | int, backend: Backend) -> Tree:
        streams = Rng.of(rng).spawn()
        return tuple(layer.init(streams.child(i), backend) for i, layer in enumerate(self.layers))

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        for use, i in enumerate(self._order()):
            with inside(self._place(use, i)):
                shape = self.layers[i].output_shape(shape)
        return shape

    def backward_size(self, shape: tuple[int, ...]) -> int:
        total = 0
        for layer in self.uses():
            total += layer.backward_size(shape)
            shape = layer.output_shape(shape)
        return total

    def forward(self, params: Tree, x: Array, rng: Rng | None = None) -> tuple[Array, Tree]:
        self._require_one_each(params)
        streams = None if rng is None else rng.spawn()
        caches = []
        for use, i in enumerate(self._order()):
            stream = None if streams is None else streams.child(use)
            with inside(self._place(use, i)):
                x, cache = self.layers[i].forward(params[i], x, stream)
            caches.append(cache)
        return x, tuple(caches)

    def evaluation(self, params: Tree, x: Array) -> tuple[Layer, Array]:
        self._require_one_each(params)
        layers = list(self.layers)
        for use, i in enumerate(self._order()):
            with inside(self._place(use, i)):  # what is used again has no batch statistics
                layers[i], x = self.layers[i].evaluation(params[i], x)
        return self._of(layers), x

    def backward(
        self, params: Tree, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        order = self._order()
        # Below the first use of a parameter nothing asks for a derivative.
        first = 0
        while not wrt_input and first < len(order) and not trees.leaves(params[order[first]]):
            first += 1
        statistics: list[list[Tree]] = [[] for _ in self.layers]
        dx: Array | None = g
        for use in reversed(range(first, len(order))):
            assert dx is not None  # asked for by the use above
            i, further = order[use], wrt_input or use > first
            dx, s = self.layers[i].backward(params[i], cache[use], dx, further)
            statistics[i].insert(0, s)
        each = zip(statistics, params, strict=True)
        merged = tuple(merge_trees(s) if s else p for s, p in each)  # p has no parameters then
        return (dx if wrt_input else None), merged

    def jvp(self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree) -> Array | None:
        for i, c in zip(self._order(), cache, strict=True):
            dx = self.layers[i].jvp(params[i], c, dx, dparams[i])
        return dx

    def backward_jvp(
        self, params: Tree, cache: Tree, g: Array, dx: Array | None, dparams: Tree, dg: Array | None
    ) -> tuple[Array | None, Tree]:
        order = self._order()
        tangents = [dx]  # of each use's input
        for i, c in zip(order, cache, strict=True):
            tangents.append(self.layers[i].jvp(params[i], c, tangents[-1], dparams[i]))
        dgradients: list[list[Tree]] = [[] for _ in self.layers]
        for use in reversed(range(len(order))):
            i, c = order[use], cache[use]
            layer, p = self.layers[i], params[i]
            below, dgradient = layer.backward_jvp(p, c, g, tangents[use], dparams[i], dg)
            dgradients[i].append(dgradient)
            if use > 0:
                next_g, _ = layer.backward(p, c, g)
                assert next_g is not None
                g = next_g
            dg = below
        return dg, tuple(map(sum_trees, dgradients))


@final
@dataclass(frozen=True, init=False, repr=False)
class Sequential(Chain):
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

    def _order(self) -> Sequence[int]:
        return range(len(self.layers))

    def _of(self, layers: Iterable[Layer]) -> Sequential:
        return Sequential(*layers)


@final
@dataclass(frozen=True, repr=False)
class Tied(Chain):
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
    >>> from kfac_np.backend import Rng, get_backend
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
        integers = isinstance(order, tuple) and all(map(is_integer, order))
        if not integers or any(not 0 <= i < len(layers) for i in order):
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

    def _order(self) -> Sequence[int]:
        return self.order

    def _of(self, layers: Iterable[Layer]) -> Tied:
        return Tied(tuple(layers), self.order)
