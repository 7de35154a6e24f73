"""What all normalisation layers do: a normalised input, then a scale and a shift.

The layers (`kfac_np.layers.norms`) differ in the axes that they take means over, and in whether
they subtract one; the derivatives are the same for all of them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

from kfac_np.backend import Array, Backend, Rng, array_namespace
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers.base import Layer
from kfac_np.statistics import ElementwiseStatistics
from kfac_np.trees import Tree
from kfac_np.validation import is_number, plain_fields, require_flag, require_sizes

__all__ = ["Normalization"]


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
    shift: ClassVar[bool] = True  # whether there is a shift besides the scale

    @property
    @abstractmethod
    def size(self) -> int:
        """C, the number of channels: the last axis."""

    @abstractmethod
    def normalized(self, x: Array) -> tuple[Array, Any]:
        """x̂ in the shape of x, and what the derivatives need besides it."""

    @abstractmethod
    def jacobian(self, x_hat: Array, other: Any, u: Array) -> Array:
        """J u, J = ∂x̂/∂x; J is symmetric, so that this serves forwards and backwards."""

    @abstractmethod
    def jacobian_change(self, x_hat: Array, other: Any, u: Array, dx: Array) -> Array | None:
        """Directional derivative of J u along dx, u fixed; None where it is zero."""

    def init(self, rng: Rng, backend: Backend) -> Tree:
        if not self.affine:
            return ()
        scale = backend.ones((1, self.size))
        return backend.xp.concat([scale, backend.zeros((1, self.size))]) if self.shift else scale

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if not shape or shape[-1] != self.size or 0 in shape:
            raise self.wrong_inputs(f"(N, ..., {self.size})", shape)
        return shape

    def forward(self, params: Tree, x: Array, rng: Rng | None = None) -> tuple[Array, Tree]:
        self.output_shape(x.shape[1:])
        self._require_params(params)
        x_hat, other = self.normalized(x)
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
        self, params: Tree, cache: Tree, g: Array, dx: Array | None, dparams: Tree, dg: Array | None
    ) -> tuple[Array | None, Tree]:
        # The input derivative is J(x) (scale · g), the gradient Σ g x̂ and Σ g.
        x_hat, other = cache
        parts = [self._scaled(dparams, g)] if self.affine else []
        if dg is not None:
            parts.append(self._scaled(params, dg))
        ddx = self.jacobian(x_hat, other, sum(parts[1:], parts[0])) if parts else None
        if dx is not None:
            change = self.jacobian_change(x_hat, other, self._scaled(params, g), dx)
            if change is not None:
                ddx = change if ddx is None else ddx + change
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
    """x̂ = r (x - mean x), r = (mean (x - mean x)² + ε)^(-½), with means over axes of a view of x.

    The view has the axes (N, T, ...), T being all locations. A layer that is not `centred` does not
    subtract the mean. With m numbers that share a mean the derivative of x̂ is

        J = r (I - 1 1ᵀ/m - x̂ x̂ᵀ/m).
    """

    epsilon: float
    axes: ClassVar[tuple[int, ...]]  # of the view, that means are taken over; negative
    centred: ClassVar[bool] = True

    def normalized(self, x: Array) -> tuple[Array, Array]:
        """x̂, and r with axes of length 1 where means were taken.

        The mean is subtracted before squares are taken, and what rounding left of it subtracted
        once more, so that single precision holds wherever the mean is. Squares are taken of numbers
        in a larger unit, so that they overflow with far larger ones; where they do, x̂ is NaN.
        """
        xp, c = array_namespace(x), self._view(x, x)
        if self.centred:
            c = c - self._mean(c)
            c = c - self._mean(c)
        unit = _unit(x, self.epsilon)
        square = c * unit
        square *= square
        square = self._mean(square)
        rate = unit / xp.sqrt(square + self.epsilon * unit * unit)
        rate = xp.where(xp.isfinite(square), rate, xp.nan)  # rather than 0
        return xp.reshape(rate * c, x.shape), rate

    def jacobian(self, x_hat: Array, other: Array, u: Array) -> Array:
        moved = self._jacobian(self._view(x_hat, x_hat), other, self._view(u, x_hat))
        return array_namespace(u).reshape(moved, u.shape)

    def _jacobian(self, x_hat: Array, rate: Array, u: Array) -> Array:
        """r (u - mean u - x̂ mean(x̂ u)) of views; u may have an axis of K vectors more than x̂."""
        c = u - self._mean(u) if self.centred else u
        return rate * (c - x_hat * self._mean(x_hat * c))

    def jacobian_change(self, x_hat: Array, other: Array, u: Array, dx: Array) -> Array:
        """-r mean(x̂ dx) J u - r (dx̂ mean(x̂ u) + x̂ mean(dx̂ u)), since dr = -r² mean(x̂ dx)."""
        shape, rate = u.shape, other
        x_hat, u, dx = (self._view(a, x_hat) for a in (x_hat, u, dx))
        ju, dx_hat = self._jacobian(x_hat, rate, u), self._jacobian(x_hat, rate, dx)
        # x̂ has mean 0 where means are subtracted, and so has dx̂: those of u and dx drop out.
        rest = dx_hat * self._mean(x_hat * u), x_hat * self._mean(dx_hat * u)
        change = -rate * (self._mean(x_hat * dx) * ju + rest[0] + rest[1])
        return array_namespace(u).reshape(change, shape)

    def _mean(self, x: Array) -> Array:
        """Mean over the axes, which stay with length 1: one axis after the other.

        Sums of sums lose fewer digits than one long sum, which NumPy adds up number by number
        unless they lie side by side.
        """
        xp = array_namespace(x)
        for axis in reversed(self.axes):
            x = xp.mean(x, axis=axis, keepdims=True)
        return x

    def _view(self, x: Array, like: Array) -> Array:
        """x of shape ([K,] *like.shape) as ([K,] N, T, ...)."""
        lead = x.shape[: x.ndim - like.ndim + 1]  # ([K,] N)
        locations = math.prod(like.shape[1:-1])
        return array_namespace(x).reshape(x, (*lead, locations, *self._last()))

    def _last(self) -> tuple[int, ...]:
        """Sizes of the axes of the view after (N, T)."""
        return (self.size,)

    def _check(self, *sizes: str) -> None:
        """Check the settings of a layer, with the sizes of these names."""
        plain_fields(self)
        name = type(self).__name__
        require_sizes(name, **{size: getattr(self, size) for size in sizes})
        require_flag(f"{name} affine", self.affine)
        # Smaller ones round to 0 in single precision, and then a constant is divided by 0.
        if not is_number(self.epsilon) or not 1e-30 <= self.epsilon < math.inf:
            raise InputError(
                f"{name}: expected epsilon to be a finite number >= 1e-30, got {self.epsilon!r}"
            )


def _unit(x: Array, epsilon: float) -> float:
    """A power of two to multiply by before squares are taken: no digit depends on it.

    It is 2⁻⁴⁰ in single precision and 2⁻³²⁰ in double, or as small as leaves squares that count
    beside ε above the smallest number.
    """
    info = array_namespace(x).finfo(x.dtype)
    largest, digits = math.log2(float(info.max)), 1 - math.log2(float(info.eps))
    least = 0.5 * (2 - largest + digits - math.log2(epsilon))
    return 2.0 ** min(0, math.ceil(max(-5 / 16 * largest, least)))
