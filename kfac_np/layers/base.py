"""What a layer is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from kfac_np import trees
from kfac_np.backend import Array, Backend, Rng
from kfac_np.errors import CurvatureError
from kfac_np.trees import Tree

__all__ = ["Layer"]


class Layer(ABC):
    """A differentiable map with explicit parameters.

    All methods are pure: a cache may be used any number of times and is never written to.
    `g` may have one more leading axis than the output, for K vectors that are carried back
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

    @abstractmethod
    def init(self, rng: Rng, backend: Backend) -> Tree:
        """Draw initial parameters; `()` for a layer without any."""

    @abstractmethod
    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one example's output, given that of its input (both without N).

        Raises
        ------
        ShapeError
            The layer does not accept such inputs.
        """

    @abstractmethod
    def forward(self, params: Tree, x: Array) -> tuple[Array, Tree]:
        """Map inputs (N, ...) to outputs, and keep in the cache what the other methods need."""

    @abstractmethod
    def backward(
        self, params: Tree, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        """Carry derivatives g of a scalar per example from the output to the input.

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
        self,
        params: Tree,
        cache: Tree,
        g: Array,
        dx: Array | None,
        dparams: Tree,
        dg: Array | None,
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
        """Cut a cache to some of the examples, as if only they had been forwarded."""
        return trees.tree_map(lambda leaf: leaf[rows, ...], cache)

    def backward_size(self, shape: tuple[int, ...]) -> int:
        """Numbers that one backward pass keeps for an example with inputs of `shape`."""
        return math.prod(self.output_shape(shape))
