"""The whole matrix: for tests, teaching and small networks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from kfac_np import trees
from kfac_np.backend import array_namespace, second_moment
from kfac_np.curvature.base import Block, Curvature, Factors, Moments, Units
from kfac_np.curvature.blocks.diagonal import require_vectors
from kfac_np.curvature.blocks.exact import ExactBlock
from kfac_np.curvature.factors import DenseFactor, rescaled
from kfac_np.curvature.ladder import Ladder, LadderEvent, factorise_each, require_damping
from kfac_np.curvature.owners import require_own
from kfac_np.curvature.units import own_units
from kfac_np.errors import CurvatureError
from kfac_np.matrices import DenseMatrix, FlattenedMatrix
from kfac_np.statistics import Scale, Statistics, term_gradients
from kfac_np.trees import Tree
from kfac_np.validation import plain_fields, require_sizes

__all__ = ["FullMatrix"]


@final
@dataclass(frozen=True)
class FullMatrix(Curvature):
    """The whole Fisher of all parameters, (1/M) Σ_{n,k} u_nk u_nkᵀ, cross-layer blocks included.

    P parameters need P² numbers: for tests and small networks. Parameters are ordered as
    `trees.ravel` orders them.

    Parameters
    ----------
    max_parameters : int
        A larger network is refused rather than allowed to exhaust the memory.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.backend import Rng
    >>> from kfac_np.fisher import Exact
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> e = Objective(Dense(1, 1, bias=False), SquaredError()).evaluate(
    ...     np.asarray([[2.0]]), np.asarray([[1.0], [3.0]]), np.zeros((2, 1)))
    >>> F = FullMatrix().estimate(e, Exact(), Rng(0))
    >>> FullMatrix().matrix(F, e.params).to_dense()
    array([[5.]])
    """

    max_parameters: int = 20_000

    def __post_init__(self) -> None:
        plain_fields(self)
        require_sizes("FullMatrix", max_parameters=self.max_parameters)

    def input_moments(self, statistics: Tree, scale: Scale) -> dict[str, Moments]:
        return {}

    def moments(self, statistics: Tree, scale: Scale) -> dict[str, Moments]:
        blocks = list(trees.items(statistics))
        for path, s in blocks:
            if not isinstance(s, Statistics):
                raise CurvatureError(
                    f"layer {path}: FullMatrix expected Statistics, got {type(s).__name__}"
                )
            require_vectors(s, f"layer {path}: FullMatrix")
        size = sum(math.prod(s.parameter_shape) for _, s in blocks)
        if size > self.max_parameters:
            raise CurvatureError(
                f"FullMatrix: expected at most {self.max_parameters} parameters, got {size}"
            )
        rows = [term_gradients(s, scale) for _, s in blocks]
        rows = array_namespace(*rows).concat(rows, axis=1)
        return {"full": {"matrix": second_moment(rows) / scale.terms}}

    def paths(self, params: Tree) -> tuple[str, ...]:
        return ("full",)

    def require_own(self, moments: Mapping[str, Moments]) -> None:
        require_own(type(self).__name__, moments, lambda path, m: (path, *m) == ("full", "matrix"))

    def matrix(self, moments: dict[str, Moments], params: Tree) -> FlattenedMatrix:
        self.require_own(moments)
        m = moments["full"]["matrix"]
        return FlattenedMatrix(DenseMatrix(m, (m.shape[0],)), params)

    def units(self, moments: dict[str, Moments], params: Tree) -> dict[str, Units]:
        each = trees.items(self.diagonal(moments, params))
        return {path: (own_units(diagonal),) for path, diagonal in each}

    def in_units(
        self, moments: dict[str, Moments], units: Mapping[str, Units]
    ) -> dict[str, Moments]:
        self.require_own(moments)
        if not units:
            return moments
        matrix, u = moments["full"]["matrix"], trees.ravel(tuple(u for (u,) in units.values()))
        if u.shape[0] != matrix.shape[0]:
            raise CurvatureError(
                f"FullMatrix units: expected those of all {matrix.shape[0]} entries of the "
                f"parameters, got those of {u.shape[0]}"
            )
        return {"full": {"matrix": rescaled(matrix, u)}}

    def factorise(
        self,
        moments: dict[str, Moments],
        damping: float,
        previous: dict[str, Factors] | None = None,
    ) -> tuple[dict[str, Factors], list[LadderEvent]]:
        require_damping(damping)
        self.require_own(moments)
        old = previous["full"]["inverse"] if previous else None
        m = DenseFactor(moments["full"]["matrix"])

        def whole(_: str, ladder: Ladder) -> Factors:
            return {"inverse": m.damped_inverse(ladder, "matrix", damping, old)}

        return factorise_each(["full"], whole, damping)

    def solve(self, factors: dict[str, Factors], v: Tree) -> Tree:
        return trees.unravel(factors["full"]["inverse"] @ trees.ravel(v), v)

    def block_of(self, path: str) -> Block:
        return ExactBlock()
