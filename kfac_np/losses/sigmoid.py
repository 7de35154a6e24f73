"""Sigmoid cross-entropy: independent Bernoulli variables given by logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from kfac_np.backend import (
    Array,
    DeferredChecks,
    Rng,
    array_namespace,
    logistic,
    sigmoid_cross_entropy,
)
from kfac_np.errors import TargetError
from kfac_np.losses.base import DiagonalLoss

__all__ = ["SigmoidCrossEntropy"]


@final
@dataclass(frozen=True)
class SigmoidCrossEntropy(DiagonalLoss):
    """ℓ = Σ_c softplus(z_c) - t_c z_c: ∇ = σ(z) - t, ∇² = diag(σ(1 - σ)), t̃ ~ Bernoulli(σ(z)).

    Targets lie anywhere in [0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> SigmoidCrossEntropy().value(np.zeros((1, 1)), np.ones((1, 1)))
    array([0.69314718])
    """

    @property
    def lower_bound(self) -> float:
        return 0.0

    def check(self, z: Array, t: Array, checks: DeferredChecks) -> None:
        super().check(z, t, checks)
        xp = array_namespace(t)
        low, high = xp.min(t), xp.max(t)
        name = "SigmoidCrossEntropy targets"
        checks.require(
            (low >= 0.0) & (high <= 1.0),
            lambda: TargetError(
                f"{name}: expected values in [0, 1], got [{float(low):g}, {float(high):g}]"
            ),
        )

    def value(self, z: Array, t: Array) -> Array:
        return array_namespace(z, t).sum(sigmoid_cross_entropy(z, t), axis=-1)

    def gradient(self, z: Array, t: Array) -> Array:
        return logistic(z) - t

    def hessian_diagonal(self, z: Array) -> Array:
        s = logistic(z)
        return s * (1.0 - s)

    def sample_targets(self, rng: Rng, z: Array) -> Array:
        return rng.bernoulli(logistic(z))

    def sample_gradient(self, rng: Rng, z: Array) -> Array:
        p = logistic(z)
        return p - rng.bernoulli(p)
