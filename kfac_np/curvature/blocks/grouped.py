"""A block for each group of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, Scalar, array_namespace
from kfac_np.curvature.base import Block, Factors, Moments, Units
from kfac_np.curvature.ladder import Ladder
from kfac_np.matrices import StackedMatrix
from kfac_np.statistics import GroupedStatistics, Scale

__all__ = ["GroupedBlock", "each_group", "stacked"]


@final
@dataclass(frozen=True)
class GroupedBlock(Block):
    """The same block for each group of a grouped layer; what couples the groups is left out.

    Each group is a layer of its own. Moments and factors are those of the groups, stacked along a
    first axis.

    Parameters
    ----------
    block : Block
        Of one group. Its `units`, `mixes_units`, `in_units`, `trace` and `solve` are given the
        stacked arrays and have to act on each group by themselves.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.curvature.blocks.kronecker import KroneckerBlock
    >>> from kfac_np.statistics import AffineStatistics
    >>> group = AffineStatistics(np.ones((5, 1, 3)), np.ones((5, 1, 2)))
    >>> block = GroupedBlock(KroneckerBlock())
    >>> block.moments(GroupedStatistics((group, group)), Scale(5, 5))["G"].shape
    (2, 2, 2)
    """

    block: Block

    def supports(self, statistics: object) -> bool:
        return isinstance(statistics, GroupedStatistics) and all(
            self.block.supports(group) for group in statistics.groups
        )

    def input_moments(self, s: GroupedStatistics, scale: Scale) -> Moments:
        return stacked(self.block.input_moments(group, scale) for group in s.groups)

    def moments(self, s: GroupedStatistics, scale: Scale) -> Moments:
        return stacked(self.block.moments(group, scale) for group in s.groups)

    def owns(self, moments: Moments) -> bool:
        return any(x.ndim for x in moments.values()) and self.block.owns(_group(moments, 0))

    def matrix(self, moments: Moments, shape: tuple[int, ...]) -> StackedMatrix:
        return StackedMatrix(tuple(self.block.matrix(m, shape[1:]) for m in each_group(moments)))

    def units(self, moments: Moments, parameter: Array) -> Units | None:
        return self.block.units(moments, parameter)

    def mixes_units(self, moments: Moments) -> Scalar | bool:
        return self.block.mixes_units(moments)

    def in_units(self, moments: Moments, units: Units) -> Moments:
        return self.block.in_units(moments, units)

    def trace(self, moments: Moments, shape: tuple[int, ...], units: Units | None) -> Array:
        return self.block.trace(moments, shape, units)

    def factorise(
        self, moments: Moments, damping: float, ladder: Ladder, previous: Factors | None = None
    ) -> Factors:
        groups = each_group(moments)
        old = each_group(previous) if previous else [None] * len(groups)
        return stacked(
            self.block.factorise(m, damping, ladder.within(f"[group {i}]"), before)
            for i, (m, before) in enumerate(zip(groups, old, strict=True))
        )

    def solves(self, factors: Factors) -> bool:
        return self.block.solves(factors)

    def solve(self, factors: Factors, v: Array) -> Array:
        return self.block.solve(factors, v)


def each_group(arrays: Mapping[str, Array]) -> list[dict[str, Array]]:
    """The arrays of each group; a number (0-d) is of all of them.

    Examples
    --------
    >>> import numpy as np
    >>> each_group({"S": np.asarray([[1.0], [2.0]]), "age": np.asarray(0.0)})
    [{'S': array([1.]), 'age': array(0.)}, {'S': array([2.]), 'age': array(0.)}]
    """
    groups = next(x.shape[0] for x in arrays.values() if x.ndim)
    return [_group(arrays, i) for i in range(groups)]


def _group(arrays: Mapping[str, Array], i: int) -> dict[str, Array]:
    return {name: x[i, ...] if x.ndim else x for name, x in arrays.items()}


def stacked(groups: Iterable[Mapping[str, Array]]) -> dict[str, Array]:
    """Arrays of all groups, each name's along a first axis.

    Examples
    --------
    >>> import numpy as np
    >>> stacked([{"A": np.zeros(1)}, {"A": np.ones(1)}])
    {'A': array([[0.],
           [1.]])}
    """
    found = list(groups)
    return {
        name: array_namespace(x).stack([arrays[name] for arrays in found])
        for name, x in found[0].items()
    }
