"""Every pair of layers Kronecker-factored, stored whole: for tests, teaching, small networks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from kfac_np import trees
from kfac_np.backend import Array, array_namespace
from kfac_np.curvature.base import Block, Curvature, Factors, Moments, Units
from kfac_np.curvature.blocks.by_kind import KFACBlock
from kfac_np.curvature.factors import DenseFactor
from kfac_np.curvature.ladder import Ladder, LadderEvent, factorise_each, require_damping
from kfac_np.curvature.networks.block_diagonal import BlockDiagonal
from kfac_np.curvature.networks.tridiagonal_moments import (
    cross_derivative_moment,
    cross_input_moment,
    rows_each,
)
from kfac_np.curvature.owners import require_own
from kfac_np.errors import CurvatureError
from kfac_np.matrices import DenseMatrix, FlattenedMatrix
from kfac_np.matrices.kronecker import kron
from kfac_np.statistics import AffineStatistics, Scale
from kfac_np.trees import Tree
from kfac_np.validation import plain_fields, require_instance, require_sizes

__all__ = ["FullKronecker"]


@final
@dataclass(frozen=True)
class FullKronecker(Curvature):
    """F̃: block (i, j) is G_ij ⊗ A_ij, moments of layers i and j together, for every i and j.

    What `BlockDiagonal` and `BlockTridiagonal` approximate further. Positive semi-definite, and
    P parameters need P² numbers. Layers must be affine and use their weights at equally many
    locations (with `reduce` all do); they need not be a chain.

    Parameters
    ----------
    block : KFACBlock
        Says how locations are shared, and how the factors of the diagonal blocks are damped; with
        exact damping it is damping · I that is added.
    max_parameters : int
        A larger network is refused rather than allowed to exhaust the memory.

    References
    ----------
    Martens & Grosse 2015, §3.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.backend import Rng
    >>> from kfac_np.fisher import Exact
    >>> from kfac_np.layers import Dense, Sequential
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> net = Sequential(Dense(1, 1, bias=False), Dense(1, 1, bias=False))
    >>> e = Objective(net, SquaredError()).evaluate(
    ...     (np.asarray([[2.0]]), np.asarray([[3.0]])), np.ones((1, 1)), np.ones((1, 1)))
    >>> curvature = FullKronecker()
    >>> curvature.matrix(curvature.estimate(e, Exact(), Rng(0)), e.params).to_dense()
    array([[9., 6.],
           [6., 4.]])
    """

    block: KFACBlock = KFACBlock()
    max_parameters: int = 20_000

    def __post_init__(self) -> None:
        plain_fields(self)
        require_instance("FullKronecker block", self.block, KFACBlock)
        require_sizes("FullKronecker", max_parameters=self.max_parameters)

    def block_of(self, path: str) -> Block:
        return self.block

    def input_moments(self, statistics: Tree, scale: Scale) -> dict[str, Moments]:
        found = dict(trees.items(statistics))
        self._require(found, scale)
        moments = BlockDiagonal(self.block).input_moments(statistics, scale)
        for path, s in found.items():
            later = [
                cross_input_moment(s, other, scale, self.block.sharing)
                for other in _after(path, found)
            ]
            if later:
                moments[path]["A_later"] = array_namespace(*later).concat(later, axis=1)
        return moments

    def moments(self, statistics: Tree, scale: Scale) -> dict[str, Moments]:
        found = dict(trees.items(statistics))
        moments = BlockDiagonal(self.block).moments(statistics, scale)
        for path, s in found.items():
            if s.num_vectors == 0:
                raise CurvatureError(
                    f"layer {path}: FullKronecker expected a Fisher type with vectors, "
                    "got InputOnly"
                )
            later = [
                cross_derivative_moment(s, other, scale, self.block.sharing)
                for other in _after(path, found)
            ]
            if later:
                moments[path]["G_later"] = array_namespace(*later).concat(later, axis=1)
        return moments

    def _require(self, found: Mapping[str, Any], scale: Scale) -> None:
        each: dict[str, int] = {}
        for path, s in found.items():
            if not isinstance(s, AffineStatistics):
                raise CurvatureError(
                    f"layer {path}: FullKronecker expected an affine layer with one matrix, got "
                    f"{type(s).__name__}"
                )
            each[path] = rows_each(s, scale, self.block.sharing)
        if len(set(each.values())) > 1:
            shown = ", ".join(f"{path}: {n}" for path, n in each.items())
            raise CurvatureError(
                "FullKronecker: expected weights used at equally many locations by all layers, "
                f"got {shown}"
            )
        size = sum(math.prod(s.parameter_shape) for s in found.values())
        if size > self.max_parameters:
            raise CurvatureError(
                f"FullKronecker: expected at most {self.max_parameters} parameters, got {size}"
            )

    def require_own(self, moments: Mapping[str, Moments]) -> None:
        last = list(moments)[-1:]

        def owns(path: str, m: Mapping[str, Array]) -> bool:
            return set(m) == {"A", "G"} | (set() if [path] == last else {"A_later", "G_later"})

        require_own(type(self).__name__, moments, owns)

    def matrix(self, moments: dict[str, Moments], params: Tree) -> FlattenedMatrix:
        self.require_own(moments)
        dense = _assembled(moments)
        return FlattenedMatrix(DenseMatrix(dense, (dense.shape[0],)), params)

    def units(self, moments: dict[str, Moments], params: Tree) -> dict[str, Units]:
        self.require_own(moments)
        return BlockDiagonal(self.block).units(_alone(moments), params)

    def mixes_units(self, moments: dict[str, Moments]) -> bool:
        return BlockDiagonal(self.block).mixes_units(_alone(moments))

    def in_units(
        self, moments: dict[str, Moments], units: Mapping[str, Units]
    ) -> dict[str, Moments]:
        self.require_own(moments)
        if not units:
            return moments
        found = BlockDiagonal(self.block).in_units(_alone(moments), units)
        paths = list(moments)
        for i, path in enumerate(paths[:-1]):
            m, later = moments[path], [units[other] for other in paths[i + 1 :]]
            (s, x), xp = units[path], array_namespace(m["G"])
            found[path] |= {
                "A_later": m["A_later"] * x.T * xp.concat([x for _, x in later], axis=1),
                "G_later": m["G_later"] * s * xp.concat([s.T for s, _ in later], axis=1),
            }
        return found

    def factorise(
        self,
        moments: dict[str, Moments],
        damping: float,
        previous: dict[str, Factors] | None = None,
    ) -> tuple[dict[str, Factors], list[LadderEvent]]:
        require_damping(damping)
        self.require_own(moments)
        old = previous["full"]["inverse"] if previous else None
        exact = self.block.exact_damping
        dense = DenseFactor(_assembled(moments if exact else self._damped(moments, damping)))
        shift = damping if exact else 0.0

        def whole(_: str, ladder: Ladder) -> Factors:
            return {"inverse": dense.damped_inverse(ladder, "matrix", shift, old)}

        return factorise_each(["full"], whole, damping)

    def _damped(self, moments: dict[str, Moments], damping: float) -> dict[str, Moments]:
        """Moments with A and G of every layer damped by the block's rule."""
        damped = {}
        for path, m in moments.items():
            shift_a, shift_g = self.block.rule(m["A"], m["G"], damping**0.5)
            damped[path] = m | {"A": _shifted(m["A"], shift_a), "G": _shifted(m["G"], shift_g)}
        return damped

    def solve(self, factors: dict[str, Factors], v: Tree) -> Tree:
        return trees.unravel(factors["full"]["inverse"] @ trees.ravel(v), v)


def _alone(moments: Mapping[str, Moments]) -> dict[str, Moments]:
    """A and G of each layer, without those that couple it to others."""
    return {path: {name: m[name] for name in ("A", "G")} for path, m in moments.items()}


def _after(path: str, found: Mapping[str, Any]) -> list[Any]:
    paths = list(found)
    return [found[name] for name in paths[paths.index(path) + 1 :]]


def _shifted(m: Array, shift: Array | float) -> Array:
    xp = array_namespace(m)
    return m + shift * xp.eye(m.shape[0], dtype=m.dtype, device=m.device)


def _assembled(moments: Mapping[str, Moments]) -> Array:
    """F̃, from the moments of each layer with itself and with all later ones."""
    paths = list(moments)
    some = moments[paths[0]]["A"]
    sizes = {p: (m["A"].shape[0], m["G"].shape[0]) for p, m in moments.items()}
    total = sum(a * g for a, g in sizes.values())
    out = array_namespace(some).zeros((total, total), dtype=some.dtype, device=some.device)
    start = 0
    for i, path in enumerate(paths):
        m, (d_in, d_out) = moments[path], sizes[path]
        stop = start + d_in * d_out
        rows = slice(start, stop)
        out[rows, rows] = kron(m["G"], m["A"])
        at, a, g = stop, 0, 0
        for other in paths[i + 1 :]:
            w_a, w_g = sizes[other]
            columns = slice(at, at + w_a * w_g)
            block = kron(m["G_later"][:, g : g + w_g], m["A_later"][:, a : a + w_a])
            out[rows, columns], out[columns, rows] = block, block.T
            at, a, g = columns.stop, a + w_a, g + w_g
        start = stop
    return out
