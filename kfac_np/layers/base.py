"""What a layer is."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import Any

from kfac_np import trees
from kfac_np.backend import Array, Backend, DeferredChecks, Rng, require_finite, require_float
from kfac_np.errors import CurvatureError, InputError, ShapeError
from kfac_np.trees import Tree

__all__ = ["Layer", "Parameterless"]


class Layer(ABC):
    """A differentiable map with explicit parameters.

    All methods are pure: a cache may be used any number of times and is never written to.
    `g` may have one more leading axis than the output, for K vectors that are backpropagated
    together: shape ([K,] N, ...). A tangent that is None is zero.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.backend import Rng, get_backend
    >>> from kfac_np.layers import Dense
    >>> layer = Dense(3, 2)
    >>> W = layer.init(Rng(0), get_backend("numpy", "float64"))
    >>> y, cache = layer.forward(W, np.ones((5, 3)))
    >>> dx, statistics = layer.backward(W, cache, np.ones_like(y))
    >>> y.shape, dx.shape, statistics.gradient().shape
    ((5, 2), (5, 3), (2, 4))
    """

    def __repr__(self) -> str:
        """The call that makes the layer: settings without a default, and those that differ."""
        settings: dict[str, Any] = getattr(self, "__dataclass_fields__", {})
        shown = []
        for name, field in settings.items():
            value = getattr(self, name)
            if field.default is dataclasses.MISSING:
                shown.append(repr(value))
            elif field.repr and value != field.default:
                shown.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def init(self, rng: Rng, backend: Backend) -> Tree:
        """Draw initial parameters; `()` for a layer without any.

        The layers of this library take a seed for `rng`, too.
        """
        return ()

    @abstractmethod
    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one example's output, given that of its input (both without N).

        Raises
        ------
        ShapeError
            The layer does not accept such inputs.
        """

    @abstractmethod
    def forward(self, params: Tree, x: Array, rng: Rng | None = None) -> tuple[Array, Tree]:
        """Map inputs (N, ...) to outputs, and keep in the cache what the other methods need.

        With `rng` it is a pass in training: layers that draw random numbers (Dropout) draw them
        from it, and others do not look at it. What draws from children of it takes those of
        `Rng.spawn`, so that the next pass draws others. Without `rng` nothing is drawn.
        """

    def evaluation(self, params: Tree, x: Array) -> tuple[Layer, Array]:
        """The layer as it is used after training, and what it makes of x.

        Layers with batch statistics take those of x, the training set or a good part of it, and
        keep them; every other layer is its own evaluation form. Parameters stay as they are.
        """
        return self, self.forward(params, x)[0]

    @property
    def children(self) -> Tree:
        """The layers that this one is made of, in the structure of its parameters; `()` if none.

        A layer in the place of a tuple says that all parameters are those of that layer.
        """
        return ()

    @property
    def couples_examples(self) -> bool:
        """Whether an example's output depends on the other examples (batch statistics)."""
        return any(child.couples_examples for child in trees.leaves(self.children))

    def at(self, path: str) -> Layer:
        """The innermost layer that owns the parameter at `path`."""
        for place, child in trees.items(self.children):
            if not place:
                return child.at(path)
            if f"{path}.".startswith(f"{place}."):
                return child.at(path[len(place) + 1 :])
        return self

    def wrong_inputs(self, expected: str, shape: tuple[int, ...]) -> ShapeError:
        """The error of `output_shape`, to be raised: inputs of an example's `shape` came."""
        came = ", ".join(map(str, ("N", *shape)))
        return ShapeError(f"{self!r}: expected inputs {expected}, got ({came})")

    def check_inputs(self, x: Array, checks: DeferredChecks) -> None:
        """Raise `InputError` unless x has a dtype and values that the layer takes.

        What an asynchronous device cannot tell yet is left to `checks`.
        """
        require_float("x", x)
        require_finite("x", x, checks)

    def input_dtype(self, like: Array) -> Any:
        """The dtype of inputs, given an array of parameters: theirs, unless inputs are indices."""
        return like.dtype

    @abstractmethod
    def backward(
        self, params: Tree, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        """Backpropagate the derivatives g of a scalar per example, from the output to the input.

        Returns
        -------
        dx : Array or None
            Derivatives with respect to the input; None unless `wrt_input`.
        statistics : tree
            One statistics object for each parameter, in the structure of `params`.
        """

    @abstractmethod
    def jvp(self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree) -> Array | None:
        """Directional derivative of the output along (dx, dparams); None stands for zero."""

    def backward_jvp(
        self, params: Tree, cache: Tree, g: Array, dx: Array | None, dparams: Tree, dg: Array | None
    ) -> tuple[Array | None, Tree]:
        """Directional derivative of `backward` along (dx, dparams, dg), for Hessian products.

        Optional: only exact Hessian products need it; gradients and curvature do not.

        Returns
        -------
        ddx : Array or None
            Derivative of the input derivative.
        dgradient : tree
            Derivative of the parameter gradient (a sum over examples), in the structure of
            `params`.

        Raises
        ------
        CurvatureError
            The layer does not define it.
        """
        raise CurvatureError(
            f"{self!r}: expected a layer with backward_jvp for a Hessian product; "
            "Fisher and GGN products do without"
        )

    def take(self, cache: Tree, rows: slice) -> Tree:
        """Cut a cache to some of the examples, as if only they had been forwarded.

        Raises
        ------
        InputError
            The examples influence each other: they must be forwarded again.
        """
        if self.couples_examples:
            raise InputError(
                f"{self!r}: expected the examples to be forwarded again, since batch statistics "
                "of a part are others than those of the whole"
            )
        return trees.tree_map(lambda leaf: leaf[rows, ...], cache)

    def backward_size(self, shape: tuple[int, ...]) -> int:
        """Numbers that one backward pass keeps for an example with inputs of `shape`."""
        return math.prod(self.output_shape(shape))


class Parameterless(Layer):
    """A layer without parameters: dy = J dx, for a matrix J that the cache determines.

    `backward_jvp` is that of a J that does not move with x, where the layer is linear or
    piecewise linear; others override it.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Flatten
    >>> layer, x = Flatten(), np.ones((5, 2, 3))
    >>> y, cache = layer.forward((), x)
    >>> layer.jvp((), cache, x, ()).shape, layer.backward((), cache, y)[0].shape
    ((5, 6), (5, 2, 3))
    """

    @abstractmethod
    def _tangent(self, cache: Tree, dx: Array) -> Array:
        """J dx."""

    @abstractmethod
    def _transpose(self, cache: Tree, g: Array) -> Array:
        """Jᵀ g, for g of shape ([K,] N, ...)."""

    def backward(
        self, params: Tree, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        return (self._transpose(cache, g) if wrt_input else None), ()

    def jvp(self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree) -> Array | None:
        return None if dx is None else self._tangent(cache, dx)

    def backward_jvp(
        self, params: Tree, cache: Tree, g: Array, dx: Array | None, dparams: Tree, dg: Array | None
    ) -> tuple[Array | None, Tree]:
        return (None if dg is None else self._transpose(cache, dg)), ()
