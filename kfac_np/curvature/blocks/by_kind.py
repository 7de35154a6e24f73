"""A block for each kind of statistics: where it is chosen what a parameter gets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

from kfac_np.backend import Array, Scalar
from kfac_np.curvature.base import Block, Factors, Moments, Units
from kfac_np.curvature.blocks.grouped import GroupedBlock
from kfac_np.curvature.blocks.kronecker import KroneckerBlock
from kfac_np.curvature.blocks.scale_shift import UnitBlock
from kfac_np.curvature.damping_rules import DampingRule, pi_trace
from kfac_np.curvature.factors import INPUTS
from kfac_np.curvature.ladder import Ladder
from kfac_np.curvature.sharing import Sharing, expand
from kfac_np.errors import CurvatureError
from kfac_np.matrices import Matrix
from kfac_np.statistics import ElementwiseStatistics, GroupedStatistics, Scale
from kfac_np.validation import plain_fields, require_callable, require_flag, require_instance

__all__ = ["ByKind", "KFACBlock", "block_of_each_kind"]


class ByKind(Block):
    """Several blocks, one for each kind of statistics.

    Blocks hold settings only, and the moments of a parameter come back from averages, other
    devices and checkpoints: the block that made them knows them by their names and forms
    (`Block.owns`, `Block.solves`). Blocks are asked in the order of `kinds`.

    Examples
    --------
    >>> import numpy as np
    >>> KFACBlock().part_of({"units": np.ones((3, 2, 2))})
    UnitBlock()
    """

    @property
    @abstractmethod
    def kinds(self) -> Mapping[type, Block]:
        """The block of each kind of statistics: the only place that asks for kinds."""

    @cached_property
    def _blocks(self) -> list[Block]:
        return list({id(block): block for block in self.kinds.values()}.values())

    def part_of(self, moments: Moments) -> Block:
        """The block that made these moments."""
        for block in self._blocks:
            if block.owns(moments):
                return block
        raise CurvatureError(
            f"{self!r} expected moments of its own, got {', '.join(moments)}; estimate them with "
            "the curvature that uses them"
        )

    def _solver(self, factors: Factors) -> Block:
        for block in self._blocks:
            if block.solves(factors):
                return block
        raise CurvatureError(f"{self!r} expected factors of its own, got {', '.join(factors)}")

    def supports(self, statistics: object) -> bool:
        kind = type(statistics)
        return kind in self.kinds and self.kinds[kind].supports(statistics)

    def input_moments(self, s: Any, scale: Scale) -> Moments:
        return self.kinds[type(s)].input_moments(s, scale)

    def moments(self, s: Any, scale: Scale) -> Moments:
        return self.kinds[type(s)].moments(s, scale)

    def owns(self, moments: Moments) -> bool:
        return any(block.owns(moments) for block in self._blocks)

    def matrix(self, moments: Moments, shape: tuple[int, ...]) -> Matrix:
        return self.part_of(moments).matrix(moments, shape)

    def units(self, moments: Moments, parameter: Array) -> Units | None:
        return self.part_of(moments).units(moments, parameter)

    def mixes_units(self, moments: Moments) -> Scalar | bool:
        return self.part_of(moments).mixes_units(moments)

    def in_units(self, moments: Moments, units: Units) -> Moments:
        return self.part_of(moments).in_units(moments, units)

    def trace(self, moments: Moments, shape: tuple[int, ...], units: Units | None) -> Array:
        return self.part_of(moments).trace(moments, shape, units)

    def factorise(
        self, moments: Moments, damping: float, ladder: Ladder, previous: Factors | None = None
    ) -> Factors:
        return self.part_of(moments).factorise(moments, damping, ladder, previous)

    def solves(self, factors: Factors) -> bool:
        return any(block.solves(factors) for block in self._blocks)

    def solve(self, factors: Factors, v: Array) -> Array:
        return self._solver(factors).solve(factors, v)

    def solve_mean(self, factors: Factors, s: Any, scale: Scale, gradient: Array) -> Array:
        return self._solver(factors).solve_mean(factors, s, scale, gradient)


@final
@dataclass(frozen=True)
class KFACBlock(ByKind):
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
        (G + γ_G I)⁻¹ ⊗ (A + γ_A I)⁻¹.
    exact_damping : bool
        Invert G ⊗ A + damping · I itself instead, by eigendecompositions; no rule is used.
    elementwise : Block
        For scale and shift: `UnitBlock` (exact 2×2 blocks), `DiagonalBlock` or `ExactBlock`.

    Notes
    -----
    Undamped, steps do not depend on the units, or on any invertible affine map, of a layer's inputs
    and outputs (Martens & Grosse 2015, §10); damping with a multiple of I ends that, unless it is
    done in the layers' own units (`Block.units`).

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

    @cached_property
    def kinds(self) -> Mapping[type, Block]:
        product = KroneckerBlock(self.sharing, self.rule, self.exact_damping)
        return block_of_each_kind(product, self.elementwise)


def block_of_each_kind(product: Block, elementwise: Block) -> dict[type, Block]:
    """What each kind of statistics gets, where layers have Kronecker factors.

    Parameters
    ----------
    product : Block
        For all that has factors A and G.
    elementwise : Block
        For scale and shift.

    Examples
    --------
    >>> block_of_each_kind(KroneckerBlock(), UnitBlock())[ElementwiseStatistics]
    UnitBlock()
    """
    return {
        **dict.fromkeys(INPUTS, product),
        GroupedStatistics: GroupedBlock(product),
        ElementwiseStatistics: elementwise,
    }
