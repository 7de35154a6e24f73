"""Normalisation layers: mean 0 and mean square 1 over some axes, then a scale and a shift.

Arrays are (N, *spatial, C), channels last. What the layers differ in is over which axes they take
means, and whether they subtract one; the derivatives are the same functions for all of them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, final

from kfac_np.backend import Array, Backend, Rng, array_namespace
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers.base import Layer
from kfac_np.layers.normalise import normalise, normalise_bend, normalise_jvp
from kfac_np.statistics import ElementwiseStatistics
from kfac_np.trees import Tree

__all__ = ["GroupNorm", "LayerNorm", "Normalization", "RMSNorm"]


class Normalization(Layer):
    """y = scale · x̂ + shift, x̂ the normalised input.

    Parameters are one array: (2, C), the rows scale and shift; (1, C), the scale alone; or `()`
    with ``affine=False``. A subclass says what x̂ is.

    Examples
    --------
    >>> import numpy as np
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
        for option, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InputError(
                    f"{name}: expected {option} to be a positive integer, got {size!r}"
                )
        # Smaller ones round to 0 in single precision, and then a constant is divided by 0.
        if not 1e-30 <= self.epsilon < math.inf:
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


@final
@dataclass(frozen=True, repr=False)
class LayerNorm(MeanNormalization):
    """x̂ = (x - mean) / √(variance + ε) over the last axis, for each example and location.

    Parameters of the layer are one array (2, features), the rows scale and shift.

    Parameters
    ----------
    features : int
        Size of the last axis.
    epsilon : float
    affine : bool
        Whether there are a scale and a shift.

    References
    ----------
    Ba, Kiros & Hinton 2016, arXiv:1607.06450, eq. 4.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.backend import get_backend
    >>> layer = LayerNorm(2)
    >>> params = layer.init(Rng(0), get_backend("numpy", "float64"))
    >>> layer.forward(params, np.asarray([[1.0, 5.0]]))[0].round(3)
    array([[-1.,  1.]])
    """

    features: int
    epsilon: float = 1e-5
    affine: bool = True

    def __post_init__(self) -> None:
        self._check("LayerNorm", features=self.features)

    def __repr__(self) -> str:
        return f"LayerNorm({self.features}{self._options()})"

    @property
    def size(self) -> int:
        return self.features

    @property
    def axes(self) -> tuple[int, ...]:
        return (-1,)


@final
@dataclass(frozen=True, repr=False)
class RMSNorm(MeanNormalization):
    """x̂ = x / √(mean of x² + ε) over the last axis, for each example and location.

    Parameters of the layer are one array (1, features), the scale; there is no shift.

    Parameters
    ----------
    features : int
        Size of the last axis.
    epsilon : float
    affine : bool
        Whether there is a scale.

    References
    ----------
    Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.

    Examples
    --------
    >>> import numpy as np
    >>> RMSNorm(2, affine=False).forward((), np.asarray([[3.0, 3.0]]))[0].round(3)
    array([[1., 1.]])
    """

    features: int
    epsilon: float = 1e-5
    affine: bool = True

    def __post_init__(self) -> None:
        self._check("RMSNorm", features=self.features)

    def __repr__(self) -> str:
        return f"RMSNorm({self.features}{self._options()})"

    @property
    def size(self) -> int:
        return self.features

    @property
    def shift(self) -> bool:
        return False

    @property
    def centred(self) -> bool:
        return False

    @property
    def axes(self) -> tuple[int, ...]:
        return (-1,)


@final
@dataclass(frozen=True, repr=False)
class GroupNorm(MeanNormalization):
    """x̂ = (x - mean) / √(variance + ε) over all locations and the channels of a group.

    Each example and each group of channels side by side has a mean and a variance of its own;
    `groups` = `channels` is instance normalisation. Parameters of the layer are one array
    (2, channels), the rows scale and shift.

    Parameters
    ----------
    groups : int
        Divides `channels`.
    channels : int
        Size of the last axis.
    epsilon : float
    affine : bool
        Whether there are a scale and a shift.

    References
    ----------
    Wu & He 2018, arXiv:1803.08494, eq. 7.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([[[1.0, 10.0], [3.0, 30.0]]])  # one example, two locations, two channels
    >>> GroupNorm(2, 2, affine=False).forward((), x)[0].round(3)
    array([[[-1., -1.],
            [ 1.,  1.]]])
    """

    groups: int
    channels: int
    epsilon: float = 1e-5
    affine: bool = True

    def __post_init__(self) -> None:
        self._check("GroupNorm", groups=self.groups, channels=self.channels)
        if self.channels % self.groups:
            raise InputError(
                f"GroupNorm: expected groups to divide channels, got {self.groups} groups for "
                f"{self.channels} channels"
            )

    def __repr__(self) -> str:
        return f"GroupNorm({self.groups}, {self.channels}{self._options()})"

    @property
    def size(self) -> int:
        return self.channels

    @property
    def axes(self) -> tuple[int, ...]:
        return (-3, -1)

    def _last(self) -> tuple[int, ...]:
        return (self.groups, self.channels // self.groups)
