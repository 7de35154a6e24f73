"""Softmax cross-entropy: a categorical variable given by logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from kfac_np.backend import (
    Array,
    Backend,
    DeferredChecks,
    Rng,
    array_namespace,
    logsumexp,
    require_finite,
    require_indices,
    require_same_place,
    softmax,
)
from kfac_np.errors import TargetError
from kfac_np.losses.base import Loss, one_hot_columns

__all__ = ["SoftmaxCrossEntropy"]


@final
@dataclass(frozen=True)
class SoftmaxCrossEntropy(Loss):
    """ℓ = -log softmax(z)_t: ∇ = p - onehot(t), ∇² = diag(p) - p pᵀ, t̃ ~ Categorical(p).

    Targets are class numbers, integers of shape (N, [S]), or distributions over the classes,
    floats of shape (N, [S,] C) that sum to 1 over the last axis. The Fisher factor is
    S = diag(√p) - p √pᵀ, for which S Sᵀ = diag(p) - p pᵀ exactly.

    Examples
    --------
    >>> import numpy as np
    >>> z = np.zeros((1, 2))
    >>> SoftmaxCrossEntropy().value(z, np.asarray([0]))
    array([0.69314718])
    >>> SoftmaxCrossEntropy().gradient(z, np.asarray([[0.25, 0.75]]))
    array([[ 0.25, -0.25]])
    """

    @property
    def lower_bound(self) -> float:
        return 0.0

    def check(self, z: Array, t: Array, checks: DeferredChecks) -> None:
        name = "SoftmaxCrossEntropy targets"
        xp = array_namespace(z)
        require_same_place(name, t, z, "outputs")
        if xp.isdtype(t.dtype, "integral"):
            if t.shape != z.shape[:-1]:
                raise TargetError(
                    f"{name}: expected class numbers of shape {z.shape[:-1]}, got {t.shape}"
                )
            what = f"{name}: expected class numbers"
            require_indices(what, t, z.shape[-1], checks, TargetError)
        elif xp.isdtype(t.dtype, "real floating"):
            if t.shape != z.shape:
                raise TargetError(f"{name}: expected distributions {z.shape}, got {t.shape}")
            require_finite(name, t, checks)
            least, off = xp.min(t), xp.max(xp.abs(xp.sum(t, axis=-1) - 1.0))
            checks.require(
                (least >= 0.0) & (off <= 1e-3),
                lambda: TargetError(
                    f"{name}: expected distributions (>= 0, sum 1); smallest entry "
                    f"{float(least):g}, largest deviation of a sum from 1 {float(off):g}"
                ),
            )
        else:
            raise TargetError(f"{name}: expected integers or floats, got dtype {t.dtype}")

    def value(self, z: Array, t: Array) -> Array:
        xp = array_namespace(z, t)
        chosen = xp.sum(_distribution(z, t) * z, axis=-1)
        return logsumexp(z)[..., 0] - chosen

    def gradient(self, z: Array, t: Array) -> Array:
        return softmax(z) - _distribution(z, t)

    def hessian_product(self, z: Array, u: Array) -> Array:
        xp = array_namespace(z, u)
        p = softmax(z)
        return p * (u - xp.sum(p * u, axis=-1, keepdims=True))

    def fisher_factor(self, z: Array, start: int = 0, stop: int | None = None) -> Array:
        xp = array_namespace(z)
        p = softmax(z)
        root = xp.sqrt(p)
        columns = one_hot_columns(root, start, stop)
        for k in range(columns.shape[0]):
            columns[k, ...] -= p * root[..., start + k : start + k + 1]
        return columns

    def sample_targets(self, rng: Rng, z: Array) -> Array:
        return _draw(rng, softmax(z))

    def sample_gradient(self, rng: Rng, z: Array) -> Array:
        p = softmax(z)
        return p - _distribution(p, _draw(rng, p))


def _draw(rng: Rng, p: Array) -> Array:
    """Class numbers with probabilities p, shape (N, [S]).

    By the inverse of the distribution function: count the classes whose cumulated probability
    the uniform number has passed.
    """
    xp = array_namespace(p)
    passed = xp.cumulative_sum(p, axis=-1)[..., :-1]
    u = rng.uniform((*p.shape[:-1], 1), Backend.of(p))
    return xp.sum(xp.astype(passed <= u, xp.int64), axis=-1)


def _distribution(z: Array, t: Array) -> Array:
    """Targets as distributions over the classes, in the dtype of z."""
    if t.ndim == z.ndim:
        return t
    xp = array_namespace(z, t)
    # Wide enough for any number of classes, which the targets' own dtype may not be.
    classes = xp.arange(z.shape[-1], dtype=xp.int64, device=t.device)
    return xp.astype(xp.astype(t, xp.int64, copy=False)[..., None] == classes, z.dtype)
