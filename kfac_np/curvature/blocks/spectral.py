"""The block of `EKFAC`: a Kronecker product's eigenvectors with eigenvalues of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from kfac_np.backend import Array, are_finite, array_namespace
from kfac_np.curvature.base import Block, Factors, Moments
from kfac_np.curvature.blocks.kronecker import KroneckerBlock, solve_in_eigenbasis
from kfac_np.curvature.ladder import Ladder, require_damping
from kfac_np.curvature.units import scales
from kfac_np.matrices import KroneckerSpectral, Matrix, ScaledMatrix
from kfac_np.statistics import Scale

__all__ = ["SpectralBlock", "eigenvectors"]


@final
@dataclass(frozen=True)
class SpectralBlock(Block):
    """F ≈ (U_G ⊗ U_A) diag(S) (U_G ⊗ U_A)ᵀ; without "U_A" that is the identity.

    `moments` are A and G. The basis, its age and S are added to them by `EKFAC`, which says when
    the basis is renewed.

    Parameters
    ----------
    kronecker : KroneckerBlock
        Makes A and G; with `marquardt` the basis and the damping are in units of their diagonals.

    Examples
    --------
    >>> import numpy as np
    >>> m = {"A": np.eye(2), "G": np.eye(1), "U_A": np.eye(2), "U_G": np.eye(1),
    ...      "S": np.asarray([[1.0, 3.0]]), "age": np.asarray(0.0)}
    >>> block = SpectralBlock(KroneckerBlock())
    >>> block.solve(block.factorise(m, 1.0, Ladder("0")), np.ones((1, 2)))
    array([[0.5 , 0.25]])
    """

    kronecker: KroneckerBlock

    @property
    def unit_free(self) -> bool:
        return self.kronecker.unit_free

    def supports(self, statistics: object) -> bool:
        return self.kronecker.supports(statistics)

    def input_moments(self, s: Any, scale: Scale) -> Moments:
        return self.kronecker.input_moments(s, scale)

    def moments(self, s: Any, scale: Scale) -> Moments:
        return self.kronecker.moments(s, scale)

    def owns(self, moments: Moments) -> bool:
        names = {"A", "G", "U_A", "U_G", "S", "age"}
        return {*moments, "U_A"} == names and moments["G"].ndim == 2

    def matrix(self, moments: Moments, shape: tuple[int, ...]) -> Matrix:
        s, u_a, u_g = moments["S"], moments.get("U_A"), moments["U_G"]
        if not self.unit_free:
            return KroneckerSpectral(s, u_a, u_g)
        u_g, units = _orthogonal(u_g)
        units = units[:, None] * array_namespace(s).ones_like(s)
        if u_a is not None:
            u_a, units_a = _orthogonal(u_a)
            units = units * units_a[None, :]
        return ScaledMatrix(KroneckerSpectral(s, u_a, u_g), units)

    def factorise(
        self, moments: Moments, damping: float, ladder: Ladder, previous: Factors | None = None
    ) -> Factors:
        require_damping(damping)
        s, basis = moments["S"], eigenvectors(moments)
        if not ladder.holds(are_finite(s, *basis.values())):
            return ladder.keep("S", previous, damping)
        if self.unit_free and "U_A" not in basis:  # units of A are in no basis
            s, damping = s + damping * scales(moments["A"])[None, :], 0.0
        return {**basis, "inverse_values": ladder.reciprocal("S", s, damping)}

    def solves(self, factors: Factors) -> bool:
        return "U_G" in factors

    def solve(self, factors: Factors, v: Array) -> Array:
        return solve_in_eigenbasis(factors, v)


def eigenvectors(m: Moments) -> Moments:
    """Of these moments "U_A", if there is one, and "U_G".

    Examples
    --------
    >>> list(eigenvectors({"A": 1, "G": 2, "U_G": 3}))
    ['U_G']
    """
    return {name: x for name, x in m.items() if name in ("U_A", "U_G")}


def _orthogonal(basis: Array) -> tuple[Array, Array]:
    """U and the units d of a basis D⁻¹ U: the rows of U have length 1."""
    xp = array_namespace(basis)
    units = 1.0 / xp.sqrt(xp.sum(basis**2, axis=-1))
    return units[:, None] * basis, units
