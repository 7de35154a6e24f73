"""Kronecker-factored blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from kfac_np.backend import (
    Array,
    Backend,
    Patches,
    Scalar,
    array_namespace,
    clip,
    second_moment,
    sum_by_index,
)
from kfac_np.curvature.base import Block, Factors, Moments, Units
from kfac_np.curvature.damping import (
    DampingRule,
    damped_inverse,
    in_own_units,
    marquardt,
    pi_trace,
)
from kfac_np.curvature.diagonal import DiagonalBlock
from kfac_np.curvature.exact import ExactBlock
from kfac_np.curvature.ladder import Ladder, require_damping
from kfac_np.curvature.sharing import Sharing, expand
from kfac_np.curvature.units import UnitBlock, commensurate, rescaled, scales
from kfac_np.errors import CurvatureError, FactorizationError
from kfac_np.matrices import KroneckerDiagonal, KroneckerMatrix, Matrix, StackedMatrix
from kfac_np.matrices.base import resolved_eigh
from kfac_np.statistics import (
    AffineStatistics,
    ElementwiseStatistics,
    EmbeddingStatistics,
    GroupedStatistics,
    Scale,
    Statistics,
)
from kfac_np.validation import plain_fields, require_callable, require_flag, require_instance

__all__ = ["KFACBlock"]


@final
@dataclass(frozen=True)
class KFACBlock(Block):
    """F ≈ G ⊗ A, A = E[ā āᵀ], G = E[g gᵀ]: acts as V ↦ G V A.

    A is a mean over examples (and locations) weighted by the examples' weights; G is the sum over
    vectors, examples and locations divided by the number M of loss terms. Each kind of parameter
    has the form that suits it:

    - affine layers, convolutions among them: one A and one G;
    - grouped convolutions: A and G for each group, which is a layer of its own;
    - embeddings: A is diagonal, and stored so;
    - scale and shift: no Kronecker product, but the block that `elementwise` makes.

    Parameters
    ----------
    sharing : callable
        `expand` (KFC) or `reduce`, for weights used at several locations.
    rule : callable
        (A, G, γ) → (γ_A, γ_G): how √damping is split between the factors. The inverse is
        (G + γ_G I)⁻¹ ⊗ (A + γ_A I)⁻¹. With `marquardt` damping is relative to the diagonals of A
        and G, and no units matter.
    exact_damping : bool
        Invert G ⊗ A + damping · I itself instead, by eigendecompositions; with `marquardt` it is
        G ⊗ A + damping · diag G ⊗ diag A, and other rules are not used.
    elementwise : Block
        For scale and shift: `UnitBlock` (exact 2×2 blocks), `DiagonalBlock` or `ExactBlock`. With
        `marquardt` it is damped by its diagonal, too.

    Notes
    -----
    Undamped, steps do not depend on the units, or on any invertible affine map, of a layer's inputs
    and outputs (Martens & Grosse 2015, §10); damping with a multiple of I ends that.

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
    elementwise: Block = UnitBlock()

    def __post_init__(self) -> None:
        plain_fields(self)
        require_callable("KFACBlock sharing", self.sharing)
        require_callable("KFACBlock rule", self.rule)
        require_flag("KFACBlock exact_damping", self.exact_damping)
        require_instance("KFACBlock elementwise", self.elementwise, Block)

    def __repr__(self) -> str:
        names = [getattr(f, "__name__", repr(f)) for f in (self.sharing, self.rule)]
        exact = ", exact_damping=True" if self.exact_damping else ""
        return f"KFACBlock({', '.join(names)}{exact})"

    @property
    def unit_free(self) -> bool:
        return self.rule is marquardt

    @property
    def _scale_and_shift(self) -> Block:
        """`elementwise`, damped in the way of the other parameters."""
        if self.unit_free and isinstance(self.elementwise, UnitBlock | DiagonalBlock | ExactBlock):
            return replace(self.elementwise, unit_free=True)
        return self.elementwise

    def supports(self, statistics: object) -> bool:
        if isinstance(statistics, ElementwiseStatistics):
            return self.elementwise.supports(statistics)
        return isinstance(statistics, AffineStatistics | GroupedStatistics | EmbeddingStatistics)

    # ------------------------------------------------------------------------------- moments

    def input_moments(self, s: Statistics, scale: Scale) -> Moments:
        if isinstance(s, ElementwiseStatistics):
            return self.elementwise.input_moments(s, scale)
        if isinstance(s, GroupedStatistics):
            return {"A": _stack([self._input_moment(group, scale) for group in s.groups])}
        if isinstance(s, EmbeddingStatistics):
            return {"A": self._frequencies(s, scale)}
        assert isinstance(s, AffineStatistics)
        return {"A": self._input_moment(s, scale)}

    def moments(self, s: Statistics, scale: Scale) -> Moments:
        if isinstance(s, ElementwiseStatistics):
            return self.elementwise.moments(s, scale)
        if isinstance(s, GroupedStatistics):
            return {"G": _stack([self._derivative_moment(group, scale) for group in s.groups])}
        assert isinstance(s, AffineStatistics | EmbeddingStatistics)
        return {"G": self._derivative_moment(s, scale)}

    def _input_moment(self, s: AffineStatistics, scale: Scale) -> Array:
        """A: the weighted mean of a aᵀ over rows, a chunk of examples at a time."""
        if isinstance(s.inputs, Patches) and self.sharing is expand and scale.weights is None:
            moment = s.inputs.second_moment()  # patches overlap: less work than row by row
            moment *= 1.0 / (s.num_examples * s.num_locations)
            return moment
        total: Any = None
        count: Any = 0.0
        first = 0  # example
        for chunk in s.inputs_only().chunks():
            rows, _ = self.sharing(chunk, scale)
            each = rows.shape[0] // chunk.num_examples
            weights = scale.row_weights(each * scale.examples)
            if weights is not None:
                weights = weights[first * each : first * each + rows.shape[0]]
            m = second_moment(rows, weights)
            total = m if total is None else total + m
            sums = rows.shape[0] if weights is None else array_namespace(rows).sum(weights)
            count = count + sums
            first += chunk.num_examples
            del chunk, rows  # before the next ones are unfolded
        total /= count
        return total

    def _frequencies(self, s: EmbeddingStatistics, scale: Scale) -> Array:
        """The diagonal of A for one-hot inputs: how often each of them occurs."""
        if self.sharing is not expand and s.indices.shape[1] > 1:
            raise CurvatureError(
                f"{self!r}: expected sharing by expand for an embedding used at "
                f"{s.indices.shape[1]} positions: A is diagonal with expand only"
            )
        xp = array_namespace(s.g)
        indices = xp.reshape(s.indices, (-1,))
        weights = scale.row_weights(indices.shape[0])
        if weights is None:
            weights = xp.ones(indices.shape, dtype=s.g.dtype, device=s.g.device)
        return sum_by_index(weights[:, None], indices, s.size)[:, 0] / xp.sum(weights)

    def _derivative_moment(self, s: AffineStatistics | EmbeddingStatistics, scale: Scale) -> Array:
        if s.num_vectors == 0:  # InputOnly
            return Backend.of(s.g).eye(s.g.shape[-1])
        affine = s if isinstance(s, AffineStatistics) else AffineStatistics(s.g, s.g)
        _, rows = self.sharing(affine.derivatives_only(), scale)
        moment = second_moment(rows)
        moment *= 1.0 / scale.terms
        return moment

    # ---------------------------------------------------------------- matrices and factors

    def owns(self, moments: Moments) -> bool:
        return set(moments) == {"A", "G"} or self.elementwise.owns(moments)

    def matrix(self, moments: Moments, shape: tuple[int, ...]) -> Matrix:
        if "G" not in moments:
            return self.elementwise.matrix(moments, shape)
        a, g = moments["A"], moments["G"]
        if a.ndim == 3:
            groups = range(a.shape[0])
            return StackedMatrix(tuple(KroneckerMatrix(a[i, ...], g[i, ...]) for i in groups))
        return KroneckerDiagonal(a, g) if a.ndim == 1 else KroneckerMatrix(a, g)

    def units(self, moments: Moments, parameter: Array) -> Units | None:
        """u_ij = s_i / a_j: root mean squares of the outputs s = W̄ā and of the inputs ā.

        E[s_i²] = w̄_iᵀ A w̄_i. A scale of 0 (a feature that never occurs, a unit that was initialised
        with zeros) counts as the largest of its layer.
        """
        if "G" not in moments:
            return self.elementwise.units(moments, parameter)
        a, w = moments["A"], parameter
        xp = array_namespace(a)
        one_hot = a.ndim == 1
        inputs = a if one_hot else xp.linalg.diagonal(a)
        terms = xp.sum(w * w * inputs[..., None, :], axis=-1)
        outputs = terms if one_hot else xp.sum((w @ a) * w, axis=-1)
        # what cancels to less than this is rounding, or as good as nothing
        outputs = xp.maximum(outputs, 1e-6 * terms)
        s, x = xp.sqrt(scales(outputs)), xp.sqrt(scales(inputs))
        return s[..., :, None], 1.0 / x[..., None, :]

    def mixes_units(self, moments: Moments) -> Scalar | bool:
        a = moments["A"] if "G" in moments else None
        if a is None or a.ndim == 1:
            return False
        xp = array_namespace(a)
        return xp.any(~commensurate(xp.linalg.diagonal(a)))

    def in_units(self, moments: Moments, units: Units) -> Moments:
        if "G" not in moments:
            return self.elementwise.in_units(moments, units)
        a, u = moments["A"], units[1][..., 0, :]
        a = a * u * u if a.ndim == 1 else rescaled(a, u)
        return {"A": a, "G": rescaled(moments["G"], units[0][..., 0])}

    def trace(self, moments: Moments, shape: tuple[int, ...], units: Units | None) -> Array:
        if "G" not in moments:
            return self.elementwise.trace(moments, shape, units)
        xp = array_namespace(moments["G"])
        a, g = moments["A"], xp.linalg.diagonal(moments["G"])
        a = a if a.ndim == 1 else xp.linalg.diagonal(a)
        if units is not None:
            g, a = g * units[0][..., 0] ** 2, a * units[1][..., 0, :] ** 2
        return xp.sum(xp.sum(g, axis=-1) * xp.sum(a, axis=-1))

    def factorise(
        self, moments: Moments, damping: float, ladder: Ladder, previous: Factors | None = None
    ) -> Factors:
        require_damping(damping)
        if "G" not in moments:
            return self._scale_and_shift.factorise(moments, damping, ladder, previous)
        if moments["A"].ndim < 3:
            return self._factorise(moments, damping, ladder, previous)
        groups = []
        for i in range(moments["A"].shape[0]):
            one = {name: m[i, ...] for name, m in moments.items()}
            old = previous and {name: f[i, ...] for name, f in previous.items()}
            groups.append(self._factorise(one, damping, ladder.within(f"[group {i}]"), old))
        return {name: _stack([factors[name] for factors in groups]) for name in groups[0]}

    def _factorise(
        self, moments: Moments, damping: float, ladder: Ladder, previous: Factors | None
    ) -> Factors:
        if self.sharing is not expand and not ladder.holds(_any(moments["G"])):
            ladder.note("G", "zero up to rounding", damping)
        if self.exact_damping:
            return self._eigenbasis(moments, damping, ladder, previous)
        shifts = self.rule(moments["A"], moments["G"], damping**0.5)
        old = previous or {}
        return {
            f"{name}_inverse": damped_inverse(
                ladder, name, moments[name], shift, old.get(f"{name}_inverse")
            )
            for name, shift in zip("AG", shifts, strict=True)
        }

    def _eigenbasis(
        self, moments: Moments, damping: float, ladder: Ladder, previous: Factors | None
    ) -> Factors:
        a, g = moments["A"], moments["G"]
        unit_a = unit_g = None
        if self.unit_free:
            (a, unit_a), (g, unit_g) = in_own_units(a), in_own_units(g)
        try:
            a, u_a = (a, None) if a.ndim == 1 else resolved_eigh(a)
            g, u_g = resolved_eigh(g)
        except FactorizationError:
            return ladder.keep("A, G", previous, damping)
        values = clip(g, low=0.0)[:, None] * clip(a, low=0.0)[None, :]
        inverse = ladder.reciprocal("A, G", values, damping)
        if unit_a is not None and unit_g is not None:  # back from the units of A and G
            u_g = unit_g[:, None] * u_g
            if u_a is None:
                inverse = inverse * (unit_a * unit_a)[None, :]
            else:
                u_a = unit_a[:, None] * u_a
        factors = {"U_G": u_g, "inverse_values": inverse}
        return factors if u_a is None else {"U_A": u_a, **factors}

    def solve(self, factors: Factors, v: Array) -> Array:
        if "U_G" in factors:
            return self._solve_in_eigenbasis(factors, v)
        if "G_inverse" not in factors:
            return self._scale_and_shift.solve(factors, v)
        a = factors["A_inverse"]
        left = factors["G_inverse"] @ v
        return left * a[None, :] if a.ndim == 1 else left @ a

    def solve_mean(self, factors: Factors, s: Any, scale: Scale, gradient: Array) -> Array:
        """G⁻¹ (Σ g āᵀ / M) A⁻¹ = Σ (G⁻¹ g)(A⁻¹ ā)ᵀ / M, whichever takes fewer operations."""
        if not self._has_few_rows(factors, s):
            return self.solve(factors, gradient)
        xp = array_namespace(gradient)
        d_out, d_in = gradient.shape
        a = xp.reshape(s.inputs, (-1, d_in)) @ factors["A_inverse"]
        g = xp.reshape(s.g, (-1, d_out)) @ factors["G_inverse"]
        g *= 1.0 / scale.terms
        return g.T @ a

    def _has_few_rows(self, factors: Factors, s: object) -> bool:
        if not isinstance(s, AffineStatistics) or isinstance(s.inputs, Patches) or s.g.ndim > 3:
            return False
        if "A_inverse" not in factors or factors["A_inverse"].ndim != 2:
            return False
        rows, (d_out, d_in) = s.num_examples * s.num_locations, s.parameter_shape
        one_by_one = rows * (d_out**2 + d_in**2 + d_out * d_in)
        return one_by_one < d_out * d_in * (d_out + d_in)

    def _solve_in_eigenbasis(self, factors: Factors, v: Array) -> Array:
        xp = array_namespace(v)
        u_a, u_g = factors.get("U_A"), factors["U_G"]
        v = xp.matrix_transpose(u_g) @ v
        v = factors["inverse_values"] * (v if u_a is None else v @ u_a)
        v = u_g @ v
        return v if u_a is None else v @ xp.matrix_transpose(u_a)

    def cost(
        self, shape: tuple[int, ...], kind: type[Statistics] = AffineStatistics
    ) -> Mapping[str, Any]:
        if kind is ElementwiseStatistics:
            return self.elementwise.cost(shape, kind)
        *groups, d_out, d_in = shape
        times = groups[0] if groups else 1
        prefix = f"{times} × " if groups else ""
        if kind is EmbeddingStatistics:
            return {
                "factors": f"A diagonal {d_in}, G {d_out}×{d_out}",
                "factorise": (9 if self.exact_damping else 2) * d_out**3 + d_in,
                "solve": (4 if self.exact_damping else 2) * d_out**2 * d_in,
            }
        cubes = times * (d_out**3 + d_in**3)
        return {
            "factors": f"{prefix}A {d_in}×{d_in}, G {d_out}×{d_out}",
            # an inverse takes 2n³ operations, a symmetric eigendecomposition about 9n³
            "factorise": (9 if self.exact_damping else 2) * cubes,
            "solve": (4 if self.exact_damping else 2) * times * d_out * d_in * (d_out + d_in),
        }


def _any(m: Array) -> Array:
    """Whether a matrix with such a diagonal is anything but 0 (NaN is)."""
    xp = array_namespace(m)
    return xp.any(xp.linalg.diagonal(m) != 0.0)


def _stack(arrays: list[Array]) -> Array:
    return array_namespace(*arrays).stack(arrays)
