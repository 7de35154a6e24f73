"""The diagonal of the Fisher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, Patches, above_rounding, are_finite, array_namespace
from kfac_np.curvature.base import Block, Factors, Moments, Units
from kfac_np.curvature.ladder import Ladder, require_damping
from kfac_np.curvature.units import own_units
from kfac_np.errors import CurvatureError
from kfac_np.matrices import DiagonalMatrix
from kfac_np.statistics import AffineStatistics, Scale, Statistics, term_gradients

__all__ = ["DiagonalBlock"]


@final
@dataclass(frozen=True)
class DiagonalBlock(Block):
    """F ≈ diag((1/M) Σ_{n,k} U_nk²), U_nk the gradient of one vector at one example.

    The exact diagonal of the chosen Fisher. Its inverse is that of diag(F) + damping · I.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.statistics import AffineStatistics, Scale, Statistics, term_gradients
    >>> s = AffineStatistics(np.asarray([[[1.0, 2.0]]]), np.asarray([[[3.0]]]))
    >>> DiagonalBlock().moments(s, Scale(terms=1, examples=1))["diagonal"]
    array([[ 9., 36.]])
    """

    def supports(self, statistics: object) -> bool:
        return isinstance(statistics, Statistics)

    def input_moments(self, s: Statistics, scale: Scale) -> Moments:
        return {}

    def moments(self, s: Statistics, scale: Scale) -> Moments:
        require_vectors(s, "DiagonalBlock")
        if not isinstance(s, AffineStatistics) or scale.coupled:
            return {"diagonal": _squared(s, scale) / scale.terms}
        xp = array_namespace(s.g)
        if s.num_locations == 1 and not isinstance(s.inputs, Patches):
            # the square of an outer product is the product of squares
            g2 = xp.sum(s.stacked_g[:, :, 0, :] ** 2, axis=0)
            return {"diagonal": g2.T @ (s.inputs[:, 0, :] ** 2) / scale.terms}
        total = xp.zeros(s.parameter_shape, dtype=s.g.dtype, device=s.g.device)
        largest = magnitude = total
        for chunk in s.chunks():
            for k in range(s.num_vectors):  # one vector at a time bounds the memory
                g, a = xp.matrix_transpose(chunk.stacked_g[k, ...]), chunk.a
                u = g @ a
                total = total + xp.sum(u**2, axis=0)
                largest = xp.maximum(largest, xp.max(xp.abs(u), axis=0))
                magnitude = xp.maximum(magnitude, xp.max(xp.abs(g) @ xp.abs(a), axis=0))
            del chunk, a, u  # before the next one is unfolded
        return {"diagonal": above_rounding(total, largest, magnitude) / scale.terms}

    def owns(self, moments: Moments) -> bool:
        return set(moments) == {"diagonal"}

    def matrix(self, moments: Moments, shape: tuple[int, ...]) -> DiagonalMatrix:
        return DiagonalMatrix(moments["diagonal"])

    def units(self, moments: Moments, parameter: Array) -> Units | None:
        return (own_units(moments["diagonal"]),)

    def in_units(self, moments: Moments, units: Units) -> Moments:
        (u,) = units
        return {"diagonal": moments["diagonal"] * u * u}

    def factorise(
        self, moments: Moments, damping: float, ladder: Ladder, previous: Factors | None = None
    ) -> Factors:
        require_damping(damping)
        diagonal = moments["diagonal"]
        if not ladder.holds(are_finite(diagonal)):
            return ladder.keep("diagonal", previous, damping)
        return {"inverse": ladder.reciprocal("diagonal", diagonal, damping)}

    def solve(self, factors: Factors, v: Array) -> Array:
        return factors["inverse"] * v


def _squared(s: Statistics, scale: Scale) -> Array:
    """Sum of squared term gradients, in the parameter's shape."""
    rows = term_gradients(s, scale)
    xp = array_namespace(rows)
    return xp.reshape(xp.sum(rows**2, axis=0), s.parameter_shape)


def require_vectors(s: Statistics, block: str) -> None:
    """Refuse statistics without vectors (`InputOnly`), which define Kronecker factors only.

    Examples
    --------
    >>> import numpy as np
    >>> require_vectors(AffineStatistics(np.ones((2, 1, 3)), np.ones((0, 2, 1, 1))), "ExactBlock")
    Traceback (most recent call last):
    kfac_np.errors.CurvatureError: ExactBlock: expected a Fisher type with vectors, got InputOnly
    """
    if s.num_vectors == 0:
        raise CurvatureError(f"{block}: expected a Fisher type with vectors, got InputOnly")
