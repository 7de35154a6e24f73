"""What a loss is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from kfac_np.backend import (
    Array,
    DeferredChecks,
    Rng,
    array_namespace,
    require_finite,
    require_float,
    require_same_place,
)
from kfac_np.errors import TargetError

__all__ = ["DiagonalLoss", "Loss"]


class Loss(ABC):
    """ℓ(z, t) = -log p(t | z) for each loss term, up to a constant in z.

    z has shape (N, [S,] C): natural parameters on the last axis, one loss term for each example
    (and position). Values are summed over C and never averaged; derivatives are those of one
    term's value.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.losses import SquaredError
    >>> z, t = np.asarray([[1.0, 3.0]]), np.asarray([[0.0, 1.0]])
    >>> SquaredError().value(z, t), SquaredError().gradient(z, t)
    (array([2.5]), array([[1., 2.]]))
    """

    @property
    def lower_bound(self) -> float:
        """A number that no value of a term is below; -inf where there is none."""
        return -math.inf

    @abstractmethod
    def check(self, z: Array, t: Array, checks: DeferredChecks) -> None:
        """Raise `TargetError` unless `t` are possible targets for outputs `z`.

        Conditions on values are given to `checks.require`, so that no step waits for a device.
        """

    @abstractmethod
    def value(self, z: Array, t: Array) -> Array:
        """ℓ for each term, shape (N, [S])."""

    @abstractmethod
    def gradient(self, z: Array, t: Array) -> Array:
        """∂ℓ/∂z for each term, shape (N, [S,] C)."""

    @abstractmethod
    def hessian_product(self, z: Array, u: Array) -> Array:
        """(∂²ℓ/∂z²) u for each term, shape of u = ([K,] N, [S,] C); it does not depend on t."""

    @abstractmethod
    def fisher_factor(self, z: Array, start: int = 0, stop: int | None = None) -> Array:
        """Columns start..stop-1 of S with S Sᵀ = ∂²ℓ/∂z², shape (stop - start, N, [S,] C)."""

    @abstractmethod
    def sample_targets(self, rng: Rng, z: Array) -> Array:
        """Draw t̃ ~ p(· | z), in a form that `gradient` takes; each call draws on from `rng`."""

    def sample_gradient(self, rng: Rng, z: Array) -> Array:
        """∂ℓ/∂z at targets drawn from p(· | z), shape (N, [S,] C).

        `gradient(z, sample_targets(rng, z))`; a subclass may know a way that computes what both
        need once.
        """
        return self.gradient(z, self.sample_targets(rng, z))

    def num_columns(self, z: Array) -> int:
        """Columns of the Fisher factor: C."""
        return z.shape[-1]


class DiagonalLoss(Loss):
    """A loss whose Hessian in z is diagonal: independent output coordinates, real targets.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.losses import SigmoidCrossEntropy
    >>> SigmoidCrossEntropy().hessian_diagonal(np.zeros((1, 2)))
    array([[0.25, 0.25]])
    """

    @abstractmethod
    def hessian_diagonal(self, z: Array) -> Array:
        """Diagonal of ∂²ℓ/∂z² for each term, shape of z."""

    def hessian_product(self, z: Array, u: Array) -> Array:
        return self.hessian_diagonal(z) * u

    def fisher_factor(self, z: Array, start: int = 0, stop: int | None = None) -> Array:
        root = array_namespace(z).sqrt(self.hessian_diagonal(z))
        return one_hot_columns(root, start, stop)

    def check(self, z: Array, t: Array, checks: DeferredChecks) -> None:
        name = f"{type(self).__name__} targets"
        require_float(name, t)
        if t.shape != z.shape:
            raise TargetError(f"{name}: expected shape {z.shape} as the outputs, got {t.shape}")
        require_same_place(name, t, z, "outputs")
        require_finite(name, t, checks)


def one_hot_columns(values: Array, start: int, stop: int | None) -> Array:
    """Columns start..stop-1 of diag(values) for each term.

    Parameters
    ----------
    values : Array, shape (N, [S,] C)

    Returns
    -------
    Array, shape (stop - start, N, [S,] C)

    Examples
    --------
    >>> import numpy as np
    >>> one_hot_columns(np.asarray([[2.0, 3.0]]), 0, None).tolist()
    [[[2.0, 0.0]], [[0.0, 3.0]]]
    """
    xp = array_namespace(values)
    stop = values.shape[-1] if stop is None else stop
    shape = (stop - start, *values.shape)
    columns = xp.zeros(shape, dtype=values.dtype, device=values.device)
    for k in range(stop - start):
        columns[k, ..., start + k] = values[..., start + k]
    return columns
