"""Elementwise activations: a value and its derivatives each."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import final

from kfac_np.backend import (
    Array,
    Rng,
    array_namespace,
    clip,
    erf,
    leaky_vjp,
    logistic,
    logistic_vjp,
    rectify,
    softplus,
    tanh_vjp,
)
from kfac_np.errors import CurvatureError
from kfac_np.layers.base import Parameterless
from kfac_np.trees import Tree
from kfac_np.validation import plain_fields, require_in

__all__ = [
    "GELU",
    "Activation",
    "Identity",
    "LeakyReLU",
    "Logistic",
    "ReLU",
    "SiLU",
    "Softplus",
    "Tanh",
]


@dataclass(frozen=True)
class Activation(Parameterless):
    """y = φ(x), elementwise. A subclass gives φ and φ′, and φ″ for products with the Hessian.

    Examples
    --------
    >>> import numpy as np
    >>> y, cache = Tanh().forward((), np.asarray([[0.0, 1.0]]))
    >>> Tanh().backward((), cache, np.ones((1, 2)))[0]
    array([[1.        , 0.41997434]])
    """

    @abstractmethod
    def value(self, x: Array) -> Array:
        """φ(x)."""

    @abstractmethod
    def derivative(self, x: Array, y: Array) -> Array:
        """φ′(x), given y = φ(x)."""

    def second_derivative(self, x: Array, y: Array) -> Array:
        """φ″(x), given y = φ(x); optional, for Hessian products only."""
        raise CurvatureError(
            f"{self!r}: expected an activation with second_derivative for a Hessian product; "
            "Fisher and GGN products do without"
        )

    def vjp(self, g: Array, x: Array, y: Array) -> Array:
        """g · φ′(x), given y = φ(x), for g of shape ([K,] *shape of x); may know a faster way."""
        return g * self.derivative(x, y)

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def forward(self, params: Tree, x: Array, rng: Rng | None = None) -> tuple[Array, Tree]:
        y = self.value(x)
        return y, (x, y)

    def _tangent(self, cache: Tree, dx: Array) -> Array:
        return self.vjp(dx, *cache)

    def _transpose(self, cache: Tree, g: Array) -> Array:
        return self.vjp(g, *cache)

    def backward_jvp(
        self, params: Tree, cache: Tree, g: Array, dx: Array | None, dparams: Tree, dg: Array | None
    ) -> tuple[Array | None, Tree]:
        ddx = None if dg is None else self.vjp(dg, *cache)
        if dx is not None:
            change = g * dx * self.second_derivative(*cache)
            ddx = change if ddx is None else ddx + change
        return ddx, ()


@final
@dataclass(frozen=True)
class Identity(Activation):
    """φ(x) = x."""

    def value(self, x: Array) -> Array:
        return x

    def derivative(self, x: Array, y: Array) -> Array:
        return array_namespace(x).ones_like(x)

    def second_derivative(self, x: Array, y: Array) -> Array:
        return array_namespace(x).zeros_like(x)

    def vjp(self, g: Array, x: Array, y: Array) -> Array:
        return g


@final
@dataclass(frozen=True)
class Tanh(Activation):
    """φ(x) = tanh(x)."""

    def value(self, x: Array) -> Array:
        return array_namespace(x).tanh(x)

    def derivative(self, x: Array, y: Array) -> Array:
        return 1.0 - y * y

    def second_derivative(self, x: Array, y: Array) -> Array:
        return -2.0 * y * (1.0 - y * y)

    def vjp(self, g: Array, x: Array, y: Array) -> Array:
        return tanh_vjp(g, y)


@final
@dataclass(frozen=True)
class Logistic(Activation):
    """φ(x) = 1 / (1 + exp(-x))."""

    def value(self, x: Array) -> Array:
        return logistic(x)

    def derivative(self, x: Array, y: Array) -> Array:
        return y * (1.0 - y)

    def second_derivative(self, x: Array, y: Array) -> Array:
        return y * (1.0 - y) * (1.0 - 2.0 * y)

    def vjp(self, g: Array, x: Array, y: Array) -> Array:
        return logistic_vjp(g, y)


@final
@dataclass(frozen=True)
class ReLU(Activation):
    """φ(x) = max(x, 0), with φ′(0) = 0."""

    def value(self, x: Array) -> Array:
        return rectify(x)

    def derivative(self, x: Array, y: Array) -> Array:
        return array_namespace(x).astype(x > 0, x.dtype)

    def second_derivative(self, x: Array, y: Array) -> Array:
        return array_namespace(x).zeros_like(x)

    def vjp(self, g: Array, x: Array, y: Array) -> Array:
        return leaky_vjp(g, x)


@final
@dataclass(frozen=True)
class LeakyReLU(Activation):
    """φ(x) = x where x > 0, slope · x elsewhere, with φ′(0) = slope.

    Parameters
    ----------
    slope : float
        In [0, 1].
    """

    slope: float = 0.01

    def __post_init__(self) -> None:
        plain_fields(self)
        require_in("LeakyReLU slope", self.slope, "[0, 1]")

    def value(self, x: Array) -> Array:
        return array_namespace(x).maximum(x, self.slope * x)

    def derivative(self, x: Array, y: Array) -> Array:
        xp = array_namespace(x)
        return self.slope + (1.0 - self.slope) * xp.astype(x > 0, x.dtype)

    def second_derivative(self, x: Array, y: Array) -> Array:
        return array_namespace(x).zeros_like(x)

    def vjp(self, g: Array, x: Array, y: Array) -> Array:
        return leaky_vjp(g, x, self.slope)


@final
@dataclass(frozen=True)
class Softplus(Activation):
    """φ(x) = log(1 + exp(x)).

    Examples
    --------
    >>> import numpy as np
    >>> Softplus().value(np.asarray([1000.0]))
    array([1000.])
    """

    def value(self, x: Array) -> Array:
        return softplus(x)

    def derivative(self, x: Array, y: Array) -> Array:
        return logistic(x)

    def second_derivative(self, x: Array, y: Array) -> Array:
        s = logistic(x)
        return s * (1.0 - s)


@final
@dataclass(frozen=True)
class SiLU(Activation):
    """φ(x) = x σ(x), also called swish."""

    def value(self, x: Array) -> Array:
        return x * logistic(x)

    def derivative(self, x: Array, y: Array) -> Array:
        s = logistic(x)
        return s + y * (1.0 - s)

    def second_derivative(self, x: Array, y: Array) -> Array:
        s = logistic(x)
        return s * (1.0 - s) * (2.0 + x * (1.0 - 2.0 * s))


@final
@dataclass(frozen=True)
class GELU(Activation):
    """φ(x) = x Φ(x) with Φ the normal distribution function (the exact form, by erf).

    References
    ----------
    Hendrycks & Gimpel 2016, arXiv:1606.08415, §2.
    """

    def value(self, x: Array) -> Array:
        return 0.5 * x * (1.0 + erf(x * 0.5**0.5))

    def derivative(self, x: Array, y: Array) -> Array:
        return 0.5 * (1.0 + erf(x * 0.5**0.5)) + x * _normal_density(x)

    def second_derivative(self, x: Array, y: Array) -> Array:
        x = _within_density(x)
        return (2.0 - x * x) * _normal_density(x)


def _normal_density(x: Array) -> Array:
    x = _within_density(x)
    return array_namespace(x).exp(-0.5 * x * x) * (2.0 * math.pi) ** -0.5


def _within_density(x: Array) -> Array:
    """x where the normal density is above 0 even in double precision, so that squares are safe."""
    return clip(x, -40.0, 40.0)
