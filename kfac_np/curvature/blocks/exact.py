"""Exact dense blocks: for tests, teaching and small networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, array_namespace, second_moment
from kfac_np.curvature.base import Block, Factors, Moments, Units
from kfac_np.curvature.blocks.diagonal import require_vectors
from kfac_np.curvature.factors import DenseFactor, rescaled
from kfac_np.curvature.ladder import Ladder, require_damping
from kfac_np.curvature.units import own_units
from kfac_np.matrices import DenseMatrix
from kfac_np.statistics import Scale, Statistics, term_gradients

__all__ = ["ExactBlock"]


@final
@dataclass(frozen=True)
class ExactBlock(Block):
    """(1/M) Σ_{n,k} vec(U_nk) vec(U_nk)ᵀ, stored whole; vec is row-major.

    U_nk is the sum over locations of g āᵀ: the exact block for every kind of weight sharing.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.statistics import AffineStatistics, Scale, Statistics, term_gradients
    >>> s = AffineStatistics(np.asarray([[[1.0, 2.0]]]), np.asarray([[[3.0]]]))
    >>> ExactBlock().moments(s, Scale(terms=1, examples=1))["block"]
    array([[ 9., 18.],
           [18., 36.]])
    """

    def supports(self, statistics: object) -> bool:
        return isinstance(statistics, Statistics)

    def input_moments(self, s: Statistics, scale: Scale) -> Moments:
        return {}

    def moments(self, s: Statistics, scale: Scale) -> Moments:
        require_vectors(s, "ExactBlock")
        return {"block": second_moment(term_gradients(s, scale)) / scale.terms}

    def owns(self, moments: Moments) -> bool:
        return set(moments) == {"block"}

    def matrix(self, moments: Moments, shape: tuple[int, ...]) -> DenseMatrix:
        return DenseMatrix(moments["block"], shape)

    def units(self, moments: Moments, parameter: Array) -> Units | None:
        xp = array_namespace(parameter)
        return (own_units(xp.reshape(xp.linalg.diagonal(moments["block"]), parameter.shape)),)

    def in_units(self, moments: Moments, units: Units) -> Moments:
        (u,) = units
        return {"block": rescaled(moments["block"], array_namespace(u).reshape(u, (-1,)))}

    def factorise(
        self, moments: Moments, damping: float, ladder: Ladder, previous: Factors | None = None
    ) -> Factors:
        require_damping(damping)
        m, old = DenseFactor(moments["block"]), (previous or {}).get("inverse")
        return {"inverse": m.damped_inverse(ladder, "block", damping, old)}

    def solve(self, factors: Factors, v: Array) -> Array:
        xp = array_namespace(v)
        return xp.reshape(factors["inverse"] @ xp.reshape(v, (-1,)), v.shape)
