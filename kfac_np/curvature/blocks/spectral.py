"""The block of `EKFAC`: a Kronecker product's eigenvectors with eigenvalues of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from kfac_np.backend import Array, Scalar, are_finite, array_namespace, clip
from kfac_np.curvature.base import Block, Factors, Moments, Units
from kfac_np.curvature.blocks.kronecker import KroneckerBlock, solve_in_eigenbasis
from kfac_np.curvature.factors import factor
from kfac_np.curvature.ladder import Ladder, require_damping
from kfac_np.errors import CurvatureError
from kfac_np.matrices import KroneckerSpectral, Matrix, ScaledMatrix
from kfac_np.statistics import Scale

__all__ = ["SpectralBlock", "eigenbasis", "units_of"]


@final
@dataclass(frozen=True)
class SpectralBlock(Block):
    """F ≈ (U_G ⊗ U_A) diag(S) (U_G ⊗ U_A)ᵀ; without "U_A" that is the identity.

    `moments` are A and G. The basis, its age and S are added to them by `EKFAC`, which says when
    the basis is renewed, and "unit_G" and "unit_A" where all this is of diag(u) F diag(u), u_ij the
    product of the two.

    Parameters
    ----------
    kronecker : KroneckerBlock
        Makes A and G, and knows the units.

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

    def supports(self, statistics: object) -> bool:
        return self.kronecker.supports(statistics)

    def input_moments(self, s: Any, scale: Scale) -> Moments:
        return self.kronecker.input_moments(s, scale)

    def moments(self, s: Any, scale: Scale) -> Moments:
        return self.kronecker.moments(s, scale)

    def owns(self, moments: Moments) -> bool:
        names = {"A", "G", "U_A", "U_G", "S", "age", "unit_A", "unit_G"}
        return {*moments, "U_A", "unit_A", "unit_G"} == names and moments["G"].ndim == 2

    def matrix(self, moments: Moments, shape: tuple[int, ...]) -> Matrix:
        m = KroneckerSpectral(moments["S"], moments.get("U_A"), moments["U_G"])
        units = units_of(moments)
        return m if units is None else ScaledMatrix(m, 1.0 / (units[0] * units[1]))

    def units(self, moments: Moments, parameter: Array) -> Units | None:
        """Those that the basis was made in, if it was in any."""
        return units_of(moments) or self.kronecker.units(moments, parameter)

    def mixes_units(self, moments: Moments) -> Scalar | bool:
        return self.kronecker.mixes_units(moments)

    def in_units(self, moments: Moments, units: Units) -> Moments:
        """Where the basis was made in none, a new one, with the eigenvalues of K-FAC."""
        new = {**moments, **self.kronecker.in_units(moments, units)}
        if units_of(moments) is None:
            a, g, basis = eigenbasis(new)
            values = clip(g, low=0.0)[..., :, None] * clip(a, low=0.0)[..., None, :]
            return new | basis | {"S": values}
        return {name: x for name, x in new.items() if name not in ("unit_A", "unit_G")}

    def trace(self, moments: Moments, shape: tuple[int, ...], units: Units | None) -> Array:
        own = units_of(moments)
        if own is None and units is not None:
            return self.kronecker.trace(moments, shape, units)
        xp, each = array_namespace(moments["S"]), moments["S"]
        if own is not None and units is None:
            each = moments["U_G"] ** 2 @ each
            if "U_A" in moments:
                each = each @ xp.matrix_transpose(moments["U_A"] ** 2)
            each = each / (own[0] * own[1]) ** 2
        return xp.sum(each)

    def factorise(
        self, moments: Moments, damping: float, ladder: Ladder, previous: Factors | None = None
    ) -> Factors:
        require_damping(damping)
        if units_of(moments) is not None:
            raise CurvatureError(
                "EKFAC: expected moments in their own units, got such as were estimated for them "
                "(in_own_units=True); give them to EKFAC.in_units first"
            )
        s, basis = moments["S"], {name: moments[name] for name in _BASIS if name in moments}
        if not ladder.holds(are_finite(s, *basis.values())):
            return ladder.keep("S", previous, damping)
        return {**basis, "inverse_values": ladder.reciprocal("S", s, damping)}

    def solves(self, factors: Factors) -> bool:
        return "U_G" in factors

    def solve(self, factors: Factors, v: Array) -> Array:
        return solve_in_eigenbasis(factors, v)


_BASIS = ("U_A", "U_G")


def eigenbasis(moments: Mapping[str, Array]) -> tuple[Array, Array, Moments]:
    """Eigenvalues of A and of G, and their eigenvectors "U_A" (unless A is diagonal) and "U_G".

    Examples
    --------
    >>> import numpy as np
    >>> a, g, basis = eigenbasis({"A": np.ones(2), "G": np.eye(1)})
    >>> a, g, basis
    (array([1., 1.]), array([1.]), {'U_G': array([[1.]])})
    """
    (a, u_a), (g, u_g) = (factor(moments[name]).eigh() for name in "AG")
    return a, g, {name: u for name, u in (("U_A", u_a), ("U_G", u_g)) if u is not None}


def units_of(moments: Moments) -> Units | None:
    """The units that a basis was made in, if it was in any.

    Examples
    --------
    >>> units_of({"S": 1.0}) is None
    True
    """
    if "unit_G" not in moments:
        return None
    return moments["unit_G"][..., :, None], moments["unit_A"][..., None, :]
