"""Eva: a curvature of rank one, of the mean input and the mean derivative."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, array_namespace
from kfac_np.optimizers.family.base import Observation, Preconditioner, Slots, affine, mixed
from kfac_np.statistics import AffineStatistics, Scale, Statistics
from kfac_np.validation import plain_fields, require_in, require_positive

__all__ = ["Eva", "mean_pair"]


def mean_pair(s: AffineStatistics, scale: Scale) -> tuple[Array, Array]:
    """Mean input ā over examples and locations, and mean derivative Σ g / M, summed over locations.

    Examples' weights multiply the derivatives already; the mean of inputs is weighted by them.

    Examples
    --------
    >>> import numpy as np
    >>> s = AffineStatistics(np.ones((5, 2, 3)), np.ones((5, 2, 4)))
    >>> mean_pair(s, Scale(5, 5))
    (array([1., 1., 1.]), array([2., 2., 2., 2.]))
    """
    xp = array_namespace(s.g)
    parts = [xp.mean(part.a, axis=1) for part in s.chunks()]
    a = parts[0] if len(parts) == 1 else xp.concat(parts, axis=0)
    w = scale.weights
    a = xp.mean(a, axis=0) if w is None else xp.sum(w[:, None] * a, axis=0) / xp.sum(w)
    return a, xp.sum(s.g, axis=(0, 1)) / scale.terms


@final
@dataclass(frozen=True)
class Eva(Preconditioner):
    """D = (g̃ g̃ᵀ ⊗ ã ãᵀ + λ I)⁻¹ ∇: ã and g̃ average the means of inputs and of derivatives.

    By Sherman and Morrison that is (∇ - (g̃ᵀ ∇ ã) / (‖ã‖² ‖g̃‖² + λ) g̃ ãᵀ) / λ: two vectors a layer
    to remember, and no matrix to invert.

    Parameters
    ----------
    damping : float
        λ.
    decay : float
        Of ã and g̃, in [0, 1); their first values are those of the first batch.

    References
    ----------
    Zhang, Shi & Li 2023, "Eva: Practical Second-order Optimization with Kronecker-vectorized
    Approximation", eq. 11-13.

    Examples
    --------
    >>> import numpy as np
    >>> s = AffineStatistics(np.asarray([[[2.0]]]), np.asarray([[[3.0]]]))
    >>> eva = Eva(damping=4.0)
    >>> eva.direction(eva.init(np.ones((1, 1))), Observation(s.gradient(), s, Scale(1, 1)), 1)[0]
    array([[0.15]])
    """

    damping: float = 1.0
    decay: float = 0.95

    def __post_init__(self) -> None:
        plain_fields(self)
        require_positive("Eva damping", self.damping)
        require_in("Eva decay", self.decay, "[0, 1)")

    def supports(self, statistics: Statistics) -> bool:
        return isinstance(statistics, AffineStatistics)

    def init(self, p: Array) -> Slots:
        zeros = array_namespace(p).zeros_like(p)
        return {"a": zeros[0, :], "g": zeros[:, 0]}

    def direction(self, slots: Slots, seen: Observation, k: int) -> tuple[Array, Slots]:
        now, beta = mean_pair(*affine(self, seen)), self.decay if k > 1 else 0.0
        a, g = (mixed(beta, slots[name], v) for name, v in zip("ag", now, strict=True))
        return self.solve(a, g, seen.gradient), {"a": a, "g": g}

    def solve(self, a: Array, g: Array, v: Array) -> Array:
        """(g gᵀ ⊗ a aᵀ + λ I)⁻¹ v for v of shape (d_out, d_in)."""
        xp = array_namespace(v)
        along = xp.vecdot(g, v @ a)
        square = xp.vecdot(a, a) * xp.vecdot(g, g)
        step = along / (square + self.damping) * g
        return (v - step[:, None] * a[None, :]) / self.damping
