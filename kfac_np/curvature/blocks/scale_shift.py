"""Exact blocks of a few weights each: scale and shift of every channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, are_finite, array_namespace
from kfac_np.curvature.base import Block, Factors, Moments, Units
from kfac_np.curvature.ladder import Ladder, require_damping
from kfac_np.curvature.units import scales
from kfac_np.matrices import UnitMatrix
from kfac_np.matrices.stacked import unit_apply, unit_eigh
from kfac_np.statistics import ElementwiseStatistics, Scale, term_gradients

__all__ = ["UnitBlock"]


@final
@dataclass(frozen=True)
class UnitBlock(Block):
    """The exact 2×2 block of each channel's scale and shift; what couples channels is left out.

    (1/M) Σ_{n,k} u uᵀ, u = (∂/∂γ_c, ∂/∂β_c); 1×1 without a shift. The damping is exact. Without
    vectors (`InputOnly`) it is what a Kronecker factor of inputs is elsewhere, the mean over
    examples and locations of u uᵀ with u = (x̂_c, 1).

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.statistics import ElementwiseStatistics, Scale
    >>> s = ElementwiseStatistics(np.full((1, 1, 1), 2.0), np.full((1, 1, 1), 3.0), True)
    >>> UnitBlock().moments(s, Scale(1, 1))["units"]
    array([[[36., 18.],
            [18.,  9.]]])
    """

    def supports(self, statistics: object) -> bool:
        return isinstance(statistics, ElementwiseStatistics)

    def input_moments(self, s: ElementwiseStatistics, scale: Scale) -> Moments:
        return {}

    def moments(self, s: ElementwiseStatistics, scale: Scale) -> Moments:
        if s.num_vectors == 0:
            return {"units": _input_moment(s, scale)}
        rows = term_gradients(s, scale)
        u = array_namespace(rows).reshape(rows, (rows.shape[0], *s.parameter_shape))
        return {"units": _squares(u, u) / scale.terms}

    def owns(self, moments: Moments) -> bool:
        return set(moments) == {"units"}

    def matrix(self, moments: Moments, shape: tuple[int, ...]) -> UnitMatrix:
        return UnitMatrix(moments["units"])

    def units(self, moments: Moments, parameter: Array) -> Units | None:
        """√(γ_c² + β_c²), the root mean square of γ x̂ + β, for scale and shift."""
        xp = array_namespace(parameter)
        return (xp.sqrt(scales(xp.sum(parameter * parameter, axis=0)))[None, :],)

    def in_units(self, moments: Moments, units: Units) -> Moments:
        (u,) = units
        return {"units": moments["units"] * (u * u)[0, :, None, None]}

    def factorise(
        self, moments: Moments, damping: float, ladder: Ladder, previous: Factors | None = None
    ) -> Factors:
        require_damping(damping)
        blocks = moments["units"]
        if not ladder.holds(are_finite(blocks)):
            return ladder.keep("units", previous, damping)
        values, vectors = unit_eigh(blocks)
        return {"inverse_values": ladder.reciprocal("units", values, damping), "U": vectors}

    def solve(self, factors: Factors, v: Array) -> Array:
        return unit_apply(factors["U"], factors["inverse_values"], v)


def _squares(u: Array, v: Array) -> Array:
    """Σ_n u_n v_nᵀ for each channel, shapes (R, r, C) to (C, r, r)."""
    xp, r = array_namespace(u), u.shape[1]
    pairs = [[xp.sum(u[:, i, :] * v[:, j, :], axis=0) for j in range(r)] for i in range(r)]
    return xp.stack([xp.stack(row, axis=-1) for row in pairs], axis=-2)


def _input_moment(s: ElementwiseStatistics, scale: Scale) -> Array:
    """The weighted mean over examples and locations of u uᵀ, u = (x̂, 1), or x̂ without a shift."""
    xp = array_namespace(s.x)
    x = xp.reshape(s.x, (-1, 1, s.x.shape[-1]))
    u = xp.concat([x, xp.ones_like(x)], axis=1) if s.shift else x
    weights = scale.row_weights(u.shape[0])
    if weights is None:
        return _squares(u, u) / u.shape[0]
    return _squares(u, weights[:, None, None] * u) / xp.sum(weights)
