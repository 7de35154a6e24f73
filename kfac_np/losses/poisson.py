"""Poisson counts with log-rate outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, Backend, DeferredChecks, Rng, array_namespace, to_numpy
from kfac_np.errors import DivergenceError, TargetError
from kfac_np.losses.base import DiagonalLoss

__all__ = ["PoissonLogRate"]

_LARGEST_RATE = 1e18  # counts are drawn as 64-bit integers


@final
@dataclass(frozen=True)
class PoissonLogRate(DiagonalLoss):
    """ℓ = Σ_c exp(z_c) - t_c z_c: ∇ = e^z - t, ∇² = diag(e^z), t̃ ~ Poisson(e^z).

    The term log t!, which does not depend on z, is left out. Targets are non-negative (counts,
    or expected counts). Samples are drawn on the host.

    Examples
    --------
    >>> import numpy as np
    >>> PoissonLogRate().gradient(np.zeros((1, 1)), np.asarray([[3.0]]))
    array([[-2.]])
    """

    def check(self, z: Array, t: Array, checks: DeferredChecks) -> None:
        super().check(z, t, checks)
        low = array_namespace(t).min(t)
        name = "PoissonLogRate targets"
        checks.require(
            low >= 0.0,
            lambda: TargetError(f"{name}: expected values >= 0, got {float(low):g}"),
        )

    def value(self, z: Array, t: Array) -> Array:
        xp = array_namespace(z, t)
        return xp.sum(xp.exp(z) - t * z, axis=-1)

    def gradient(self, z: Array, t: Array) -> Array:
        return array_namespace(z).exp(z) - t

    def hessian_diagonal(self, z: Array) -> Array:
        return array_namespace(z).exp(z)

    def sample_targets(self, rng: Rng, z: Array) -> Array:
        xp = array_namespace(z)
        rate = xp.exp(z)
        largest = float(xp.max(rate))
        if not largest <= _LARGEST_RATE:
            raise DivergenceError(
                f"PoissonLogRate: expected rates up to {_LARGEST_RATE:g} to draw counts, "
                f"got {largest:g}"
            )
        return rng.poisson(to_numpy(rate), Backend.of(z))
