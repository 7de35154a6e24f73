"""Squared error: a Gaussian of unit variance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, Backend, Rng, array_namespace
from kfac_np.losses.base import DiagonalLoss

__all__ = ["SquaredError"]


@final
@dataclass(frozen=True)
class SquaredError(DiagonalLoss):
    """ℓ = ½ ‖z - t‖² (with the ½): ∇ = z - t, ∇² = I, t̃ = z + ε with ε ~ N(0, I).

    Examples
    --------
    >>> import numpy as np
    >>> SquaredError().value(np.asarray([[3.0, 4.0]]), np.zeros((1, 2)))
    array([12.5])
    """

    @property
    def lower_bound(self) -> float:
        return 0.0

    def value(self, z: Array, t: Array) -> Array:
        xp = array_namespace(z, t)
        return 0.5 * xp.sum((z - t) ** 2, axis=-1)

    def gradient(self, z: Array, t: Array) -> Array:
        return z - t

    def hessian_diagonal(self, z: Array) -> Array:
        return array_namespace(z).ones_like(z)

    def sample_targets(self, rng: Rng, z: Array) -> Array:
        return z + rng.normal(z.shape, Backend.of(z))

    def sample_gradient(self, rng: Rng, z: Array) -> Array:
        return -rng.normal(z.shape, Backend.of(z))
