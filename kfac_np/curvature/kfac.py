"""Kronecker-factored blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from kfac_np.backend import Array, Backend, array_namespace, second_moment
from kfac_np.curvature.base import Block, Factors, Moments
from kfac_np.curvature.damping import DampingRule, pi_trace
from kfac_np.curvature.ladder import Ladder
from kfac_np.curvature.sharing import Sharing, expand
from kfac_np.errors import FactorizationError
from kfac_np.matrices import KroneckerMatrix
from kfac_np.matrices.base import resolved_eigh
from kfac_np.statistics import AffineStatistics, Scale

__all__ = ["KFACBlock"]


@final
@dataclass(frozen=True)
class KFACBlock(Block):
    """F ≈ G ⊗ A, A = E[ā āᵀ], G = E[g gᵀ]: acts as V ↦ G V A.

    A is a mean over examples (and locations) weighted by the examples' weights; G is the sum over
    vectors, examples and locations divided by the number M of loss terms.

    Parameters
    ----------
    sharing : callable
        `expand` (KFC) or `reduce`, for weights used at several locations.
    rule : callable
        (A, G, γ) → (γ_A, γ_G): how √damping is split between the factors. The inverse is
        (G + γ_G I)⁻¹ ⊗ (A + γ_A I)⁻¹.
    exact_damping : bool
        Invert G ⊗ A + damping · I itself instead, by eigendecompositions; `rule` is not used.

    References
    ----------
    Martens & Grosse 2015, §3 and §6.3; Grosse & Martens 2016, §3; Eschenhagen et al. 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.statistics import AffineStatistics, Scale
    >>> s = AffineStatistics(np.asarray([[[1.0, 2.0]]]), np.asarray([[[3.0]]]))
    >>> block, scale = KFACBlock(), Scale(terms=1, examples=1)
    >>> m = {**block.input_moments(s, scale), **block.moments(s, scale)}
    >>> block.matrix(m, (1, 2)).to_dense()
    array([[ 9., 18.],
           [18., 36.]])
    """

    sharing: Sharing = expand
    rule: DampingRule = pi_trace
    exact_damping: bool = False

    def __repr__(self) -> str:
        names = [getattr(f, "__name__", repr(f)) for f in (self.sharing, self.rule)]
        exact = ", exact_damping=True" if self.exact_damping else ""
        return f"KFACBlock({', '.join(names)}{exact})"

    def supports(self, statistics: object) -> bool:
        return isinstance(statistics, AffineStatistics)

    def input_moments(self, s: AffineStatistics, scale: Scale) -> Moments:
        rows, _ = self.sharing(s, scale)
        weights = scale.row_weights(rows.shape[0])
        total = rows.shape[0] if weights is None else array_namespace(rows).sum(weights)
        return {"A": second_moment(rows, weights) / total}

    def moments(self, s: AffineStatistics, scale: Scale) -> Moments:
        if s.num_vectors == 0:  # InputOnly
            return {"G": Backend.of(s.g).eye(s.g.shape[-1])}
        _, rows = self.sharing(s, scale)
        return {"G": second_moment(rows) / scale.terms}

    def matrix(self, moments: Moments, shape: tuple[int, ...]) -> KroneckerMatrix:
        return KroneckerMatrix(moments["A"], moments["G"])

    def factorise(
        self, moments: Moments, damping: float, ladder: Ladder, previous: Factors | None = None
    ) -> Factors:
        if self.exact_damping:
            return self._eigenbasis(moments, damping, ladder, previous)
        damping_a, damping_g = self.rule(moments["A"], moments["G"], damping**0.5)
        old = previous or {}
        return {
            "A_inverse": ladder.inverse("A", moments["A"], damping_a, old.get("A_inverse")),
            "G_inverse": ladder.inverse("G", moments["G"], damping_g, old.get("G_inverse")),
        }

    def _eigenbasis(
        self, moments: Moments, damping: float, ladder: Ladder, previous: Factors | None
    ) -> Factors:
        try:
            a, u_a = resolved_eigh(moments["A"])
            g, u_g = resolved_eigh(moments["G"])
        except FactorizationError:
            return ladder.keep("A, G", previous, damping)
        xp = array_namespace(a)
        values = xp.clip(g, min=0.0)[:, None] * xp.clip(a, min=0.0)[None, :]
        return {
            "U_A": u_a,
            "U_G": u_g,
            "inverse_values": ladder.reciprocal("A, G", values, damping),
        }

    def solve(self, factors: Factors, v: Array) -> Array:
        if "U_A" in factors:
            u_a, u_g = factors["U_A"], factors["U_G"]
            return u_g @ (factors["inverse_values"] * (u_g.T @ v @ u_a)) @ u_a.T
        return factors["G_inverse"] @ v @ factors["A_inverse"]

    def cost(self, shape: tuple[int, ...]) -> Mapping[str, Any]:
        d_out, d_in = shape
        cubes = d_out**3 + d_in**3
        return {
            "factors": f"A {d_in}×{d_in}, G {d_out}×{d_out}",
            # an inverse takes 2n³ operations, a symmetric eigendecomposition about 9n³
            "factorise": (9 if self.exact_damping else 2) * cubes,
            "solve": (4 if self.exact_damping else 2) * d_out * d_in * (d_out + d_in),
        }
