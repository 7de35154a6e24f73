"""The Kronecker product of one layer's inputs and derivatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from kfac_np.backend import Array, Patches, Scalar, array_namespace, clip
from kfac_np.curvature.base import Block, Factors, Moments, Units
from kfac_np.curvature.damping_rules import DampingRule, pi_trace
from kfac_np.curvature.factors import INPUTS, DenseFactor, derivative_moment, factor, rescaled
from kfac_np.curvature.ladder import Ladder, require_damping
from kfac_np.curvature.sharing import Sharing, expand
from kfac_np.curvature.units import scales
from kfac_np.errors import FactorizationError
from kfac_np.matrices import Matrix
from kfac_np.statistics import AffineStatistics, Scale

__all__ = ["KroneckerBlock", "solve_in_eigenbasis"]


@final
@dataclass(frozen=True)
class KroneckerBlock(Block):
    """F ≈ G ⊗ A of an affine layer or an embedding: acts as V ↦ G V A.

    `KFACBlock`, which has the settings and the references, is this block where a layer has a
    Kronecker product. What A is stored as follows from the statistics
    (`kfac_np.curvature.factors`); nothing here depends on it. All but the moments, `matrix` and
    `factorise` take arrays with an axis for groups in front, too.

    Examples
    --------
    >>> import numpy as np
    >>> s = AffineStatistics(np.asarray([[[1.0, 2.0]]]), np.asarray([[[3.0]]]))
    >>> block, scale = KroneckerBlock(), Scale(terms=1, examples=1)
    >>> m = {**block.input_moments(s, scale), **block.moments(s, scale)}
    >>> block.matrix(m, (1, 2)).to_dense()
    array([[ 9., 18.],
           [18., 36.]])
    """

    sharing: Sharing = expand
    rule: DampingRule = pi_trace
    exact_damping: bool = False

    # ------------------------------------------------------------------------------- moments

    def supports(self, statistics: object) -> bool:
        return type(statistics) in INPUTS

    def input_moments(self, s: Any, scale: Scale) -> Moments:
        return {"A": INPUTS[type(s)].input_moment(s, self.sharing, scale)}

    def moments(self, s: Any, scale: Scale) -> Moments:
        return {"G": derivative_moment(s, self.sharing, scale)}

    def owns(self, moments: Moments) -> bool:
        return moments.keys() == {"A", "G"} and moments["G"].ndim == 2

    # ---------------------------------------------------------------------- matrix and units

    def matrix(self, moments: Moments, shape: tuple[int, ...]) -> Matrix:
        return factor(moments["A"]).product(moments["G"])

    def units(self, moments: Moments, parameter: Array) -> Units | None:
        """u_ij = s_i / a_j: root mean squares of the outputs s = W̄ā and of the inputs ā.

        E[s_i²] = w̄_iᵀ A w̄_i. A scale of 0 (a feature that never occurs, a unit that was initialised
        with zeros) counts as the largest of its layer.
        """
        a, w = factor(moments["A"]), parameter
        xp, inputs = array_namespace(w), a.diagonal()
        terms = xp.sum(w * w * inputs[..., None, :], axis=-1)
        # what cancels to less than this is rounding, or as good as nothing
        outputs = xp.maximum(a.quadratic(w), 1e-6 * terms)
        s, x = xp.sqrt(scales(outputs)), xp.sqrt(scales(inputs))
        return s[..., :, None], 1.0 / x[..., None, :]

    def mixes_units(self, moments: Moments) -> Scalar | bool:
        return factor(moments["A"]).mixes_units()

    def in_units(self, moments: Moments, units: Units) -> Moments:
        s, x = units
        a = factor(moments["A"]).rescaled(x[..., 0, :])
        return {"A": a, "G": rescaled(moments["G"], s[..., 0])}

    def trace(self, moments: Moments, shape: tuple[int, ...], units: Units | None) -> Array:
        xp = array_namespace(moments["G"])
        a, g = factor(moments["A"]).diagonal(), xp.linalg.diagonal(moments["G"])
        if units is not None:
            g, a = g * units[0][..., 0] ** 2, a * units[1][..., 0, :] ** 2
        return xp.sum(xp.sum(g, axis=-1) * xp.sum(a, axis=-1))

    # --------------------------------------------------------------------- factors and solve

    def factorise(
        self, moments: Moments, damping: float, ladder: Ladder, previous: Factors | None = None
    ) -> Factors:
        require_damping(damping)
        if self.sharing is not expand and not ladder.holds(_any(moments["G"])):
            ladder.note("G", "zero up to rounding", damping)
        if self.exact_damping:
            return self._eigenbasis(moments, damping, ladder, previous)
        shifts = self.rule(moments["A"], moments["G"], damping**0.5)
        old = previous or {}
        return {
            f"{name}_inverse": factor(moments[name]).damped_inverse(
                ladder, name, shift, old.get(f"{name}_inverse")
            )
            for name, shift in zip("AG", shifts, strict=True)
        }

    def _eigenbasis(
        self, moments: Moments, damping: float, ladder: Ladder, previous: Factors | None
    ) -> Factors:
        a, g = factor(moments["A"]), DenseFactor(moments["G"])
        try:
            (values_a, u_a), (values_g, u_g) = a.eigh(), g.eigh()
        except FactorizationError:
            return ladder.keep("A, G", previous, damping)
        values = clip(values_g, low=0.0)[:, None] * clip(values_a, low=0.0)[None, :]
        inverse = ladder.reciprocal("A, G", values, damping)
        factors = {"U_G": u_g, "inverse_values": inverse}
        return factors if u_a is None else {"U_A": u_a, **factors}

    def solves(self, factors: Factors) -> bool:
        return ("U_G" if self.exact_damping else "G_inverse") in factors

    def solve(self, factors: Factors, v: Array) -> Array:
        if self.exact_damping:
            return solve_in_eigenbasis(factors, v)
        return factor(factors["A_inverse"]).apply(factors["G_inverse"] @ v)

    def solve_mean(self, factors: Factors, s: Any, scale: Scale, gradient: Array) -> Array:
        """G⁻¹ (Σ g āᵀ / M) A⁻¹ = Σ (G⁻¹ g)(A⁻¹ ā)ᵀ / M, whichever takes fewer operations."""
        if self.exact_damping or not _has_few_rows(s):
            return self.solve(factors, gradient)
        xp = array_namespace(gradient)
        d_out, d_in = gradient.shape
        a = xp.reshape(s.inputs, (-1, d_in)) @ factors["A_inverse"]
        g = xp.reshape(s.g, (-1, d_out)) @ factors["G_inverse"]
        g *= 1.0 / scale.terms
        return g.T @ a


def solve_in_eigenbasis(factors: Factors, v: Array) -> Array:
    """U_G (inverse_values ∘ (U_Gᵀ v U_A)) U_Aᵀ; without "U_A" that is the identity.

    Examples
    --------
    >>> import numpy as np
    >>> solve_in_eigenbasis({"U_G": np.eye(1), "inverse_values": np.full((1, 2), 3.0)}, np.ones(
    ...     (1, 2)))
    array([[3., 3.]])
    """
    xp = array_namespace(v)
    u_a, u_g = factors.get("U_A"), factors["U_G"]
    v = xp.matrix_transpose(u_g) @ v
    v = factors["inverse_values"] * (v if u_a is None else v @ u_a)
    v = u_g @ v
    return v if u_a is None else v @ xp.matrix_transpose(u_a)


def _has_few_rows(s: object) -> bool:
    """Whether inputs and derivatives row by row are less work than their product, a gradient."""
    if not isinstance(s, AffineStatistics) or isinstance(s.inputs, Patches) or s.g.ndim > 3:
        return False
    rows, (d_out, d_in) = s.num_examples * s.num_locations, s.parameter_shape
    one_by_one = rows * (d_out**2 + d_in**2 + d_out * d_in)
    return one_by_one < d_out * d_in * (d_out + d_in)


def _any(m: Array) -> Array:
    """Whether a matrix with such a diagonal is anything but 0 (NaN is)."""
    xp = array_namespace(m)
    return xp.any(xp.linalg.diagonal(m) != 0.0)
