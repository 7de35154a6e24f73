"""What all normalisation layers do: a normalised input, then a scale and a shift.

What the layers differ in is over which axes they take means, and whether they subtract one; the
derivatives are the same functions for all of them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

from kfac_np.backend import Array, Backend, Rng, array_namespace
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers.base import Layer
from kfac_np.layers.normalise import normalise, normalise_bend, normalise_jvp
from kfac_np.statistics import ElementwiseStatistics
from kfac_np.trees import Tree
from kfac_np.validation import is_number, plain_fields, require_flag, require_sizes

__all__ = ["MeanNormalization", "Normalization"]


class Normalization(Layer):
    """y = scale · x̂ + shift, x̂ the normalised input.

    Parameters are one array: (2, C), the rows scale and shift; (1, C), the scale alone; or `()`
    with ``affine=False``. A subclass says what x̂ is.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import LayerNorm
    >>> y, cache = LayerNorm(2, affine=False).forward((), np.asarray([[0.0, 100.0]]))
    >>> y.round(3)
    array([[-1.,  1.]])
    """

    affine: bool

    @property
    @abstractmethod
    def size(self) -> int:
        """C, the number of channels: the last axis."""

    @property
    def shift(self) -> bool:
        """Whether there is a shift besides the scale."""
        return True

    @abstractmethod
    def normalised(self, x: Array) -> tuple[Array, Any]:
        """x̂ in the shape of x, and what the derivatives need besides it."""

    @abstractmethod
    def jacobian(self, x_hat: Array, other: Any, u: Array) -> Array:
        """∂x̂/∂x times u; symmetric, so that it serves forwards and backwards."""

    @abstractmethod
    def jacobian_change(self, x_hat: Array, other: Any, u: Array, dx: Array) -> Array | None:
        """Directional derivative of `jacobian`, u fixed, along dx; None where it is zero."""

    def init(self, rng: Rng, backend: Backend) -> Tree:
        if not self.affine:
            return ()
        scale = backend.ones((1, self.size))
        return backend.xp.concat([scale, backend.zeros((1, self.size))]) if self.shift else scale

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not shape or shape[-1] != self.size or 0 in shape:
            came = ", ".join(map(str, ("N", *shape)))
            raise ShapeError(f"{self!r}: expected inputs (N, ..., {self.size}), got ({came})")
        return shape

    def forward(self, params: Tree, x: Array) -> tuple[Array, Tree]:
        self.output_shape(x.shape[1:])
        self._require_params(params)
        x_hat, other = self.normalised(x)
        return self._affine(params, x_hat), (x_hat, other)

    def backward(
        self, params: Tree, cache: Tree, g: Array, wrt_input: bool = True
    ) -> tuple[Array | None, Tree]:
        x_hat, other = cache
        dx = self.jacobian(x_hat, other, self._scaled(params, g)) if wrt_input else None
        return dx, self._statistics(x_hat, g) if self.affine else ()

    def jvp(self, params: Tree, cache: Tree, dx: Array | None, dparams: Tree) -> Array | None:
        x_hat, other = cache
        dy = self._affine(dparams, x_hat) if self.affine else None
        if dx is None:
            return dy
        moved = self._scaled(params, self.jacobian(x_hat, other, dx))
        return moved if dy is None else dy + moved

    def backward_jvp(
        self,
        params: Tree,
        cache: Tree,
        g: Array,
        dx: Array | None,
        dparams: Tree,
        dg: Array | None,
    ) -> tuple[Array | None, Tree]:
        # The input derivative is J(x) (scale · g), the gradient Σ g x̂ and Σ g.
        x_hat, other = cache
        parts = [self._scaled(dparams, g)] if self.affine else []
        if dg is not None:
            parts.append(self._scaled(params, dg))
        ddx = self.jacobian(x_hat, other, sum(parts[1:], parts[0])) if parts else None
        if dx is not None:
            bent = self.jacobian_change(x_hat, other, self._scaled(params, g), dx)
            if bent is not None:
                ddx = bent if ddx is None else ddx + bent
        if not self.affine:
            return ddx, ()
        dgradient = array_namespace(params).zeros_like(params)
        if dg is not None:
            dgradient += self._statistics(x_hat, dg).gradient()
        if dx is not None:
            moved = self._statistics(self.jacobian(x_hat, other, dx), g).gradient()
            dgradient[:1, :] += moved[:1, :]  # the shift does not see x
        return ddx, dgradient

    def _affine(self, params: Tree, x: Array) -> Array:
        y = self._scaled(params, x)
        return y + params[1, :] if self.affine and self.shift else y

    def _scaled(self, params: Tree, x: Array) -> Array:
        return params[0, :] * x if self.affine else x

    def _statistics(self, x_hat: Array, g: Array) -> ElementwiseStatistics:
        xp = array_namespace(g)
        n, t, c = x_hat.shape[0], math.prod(x_hat.shape[1:-1]), x_hat.shape[-1]
        vectors = g.shape[: g.ndim - x_hat.ndim]  # (K,) or ()
        return ElementwiseStatistics(
            xp.reshape(x_hat, (n, t, c)), xp.reshape(g, (*vectors, n, t, c)), self.shift
        )

    def _require_params(self, params: Tree) -> None:
        expected = (1 + self.shift, self.size) if self.affine else ()
        if self.affine:
            right = getattr(params, "shape", None) == expected
        else:
            right = isinstance(params, tuple | list) and len(params) == 0
        if not right:
            came = tuple(params.shape) if hasattr(params, "shape") else type(params).__name__
            raise ShapeError(f"{self!r}: expected parameters {expected}, got {came}")


class MeanNormalization(Normalization):
    """x̂ = (x - mean x) / √(variance + ε), with means over some axes of a view of x.

    The view has the axes (N, T, ...), T being all locations.

    Examples
    --------
    >>> from kfac_np.layers import GroupNorm, LayerNorm, RMSNorm
    >>> LayerNorm(3).axes, GroupNorm(2, 4).axes, RMSNorm(3).centred
    ((-1,), (-3, -1), False)
    """

    epsilon: float

    @property
    @abstractmethod
    def axes(self) -> tuple[int, ...]:
        """Axes of the view that means are taken over, from the end, hence negative."""

    @property
    def centred(self) -> bool:
        """Whether the mean is subtracted."""
        return True

    def _last(self) -> tuple[int, ...]:
        """Sizes of the axes of the view after (N, T)."""
        return (self.size,)

    def _check(self, name: str, **sizes: int) -> None:
        """Check the settings of a layer with these sizes; to be called in `__post_init__`."""
        require_sizes(name, **sizes)
        plain_fields(self)
        require_flag(f"{name} affine", self.affine)
        # Smaller ones round to 0 in single precision, and then a constant is divided by 0.
        if not is_number(self.epsilon) or not 1e-30 <= self.epsilon < math.inf:
            raise InputError(
                f"{name}: expected epsilon to be a finite number >= 1e-30, got {self.epsilon!r}"
            )

    def _options(self) -> str:
        epsilon = "" if self.epsilon == 1e-5 else f", epsilon={self.epsilon!r}"
        return epsilon + ("" if self.affine else ", affine=False")

    def _view(self, x: Array, like: Array) -> Array:
        """x of shape ([K,] *like.shape) as ([K,] N, T, ...)."""
        lead = x.shape[: x.ndim - like.ndim + 1]  # ([K,] N)
        locations = math.prod(like.shape[1:-1])
        return array_namespace(x).reshape(x, (*lead, locations, *self._last()))

    def normalised(self, x: Array) -> tuple[Array, Array]:
        x_hat, rate = normalise(self._view(x, x), self.axes, self.centred, self.epsilon)
        return array_namespace(x).reshape(x_hat, x.shape), rate

    def jacobian(self, x_hat: Array, other: Array, u: Array) -> Array:
        v = self._view(u, x_hat)
        moved = normalise_jvp(self._view(x_hat, x_hat), other, v, self.axes, self.centred)
        return array_namespace(u).reshape(moved, u.shape)

    def jacobian_change(self, x_hat: Array, other: Array, u: Array, dx: Array) -> Array:
        x_hat, v, dv = (self._view(a, x_hat) for a in (x_hat, u, dx))
        bent = normalise_bend(x_hat, other, v, dv, self.axes, self.centred)
        return array_namespace(u).reshape(bent, u.shape)
