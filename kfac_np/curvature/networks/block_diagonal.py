"""One block for each parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

from kfac_np import trees
from kfac_np.backend import Array, on_host
from kfac_np.backend.numpy_kernels.threads import side_by_side
from kfac_np.curvature.base import Block, Curvature, Factors, Moments, Units
from kfac_np.curvature.blocks.by_kind import KFACBlock
from kfac_np.curvature.ladder import Ladder, LadderEvent, factorise_each, require_damping
from kfac_np.curvature.owners import require_own
from kfac_np.errors import CurvatureError
from kfac_np.matrices import BlockDiagonalMatrix, Matrix
from kfac_np.statistics import Scale
from kfac_np.trees import Tree
from kfac_np.validation import require_instance

__all__ = ["BlockDiagonal"]


@final
@dataclass(frozen=True)
class BlockDiagonal(Curvature):
    """A block-diagonal approximation: K-FAC of all layers unless told otherwise.

    Parameters
    ----------
    block : Block
        For every parameter that has no entry in `overrides`.
    overrides : mapping of path to Block, optional
        For parameters named by their path, as `describe` shows it. A parameter that `block` does
        not support is an error unless it is named here: nothing is skipped silently.

    References
    ----------
    Martens & Grosse 2015, §4.2.

    Examples
    --------
    >>> from kfac_np.curvature import DiagonalBlock
    >>> BlockDiagonal(overrides={"2": DiagonalBlock()}).block_of("2")
    DiagonalBlock()
    """

    block: Block = KFACBlock()
    overrides: Mapping[str, Block] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_instance("BlockDiagonal block", self.block, Block)
        require_instance("BlockDiagonal overrides", self.overrides, Mapping)
        for path, block in self.overrides.items():
            require_instance("BlockDiagonal overrides: path", path, str)
            require_instance(f"BlockDiagonal overrides[{path!r}]", block, Block)

    @property
    def separable(self) -> bool:
        return True

    def block_of(self, path: str) -> Block:
        return self.overrides.get(path, self.block)

    def require_paths(self, paths: Iterable[str]) -> None:
        """Raise `CurvatureError` if `overrides` names a path that is not among `paths`."""
        expected = list(paths)
        if unknown := sorted(self.overrides.keys() - set(expected)):
            raise CurvatureError(
                f"overrides: expected paths among {', '.join(expected)}; got {', '.join(unknown)}"
            )

    def input_moments(self, statistics: Tree, scale: Scale) -> dict[str, Moments]:
        found = dict(trees.items(statistics))
        self.require_paths(found)
        for path, s in found.items():
            if not self.block_of(path).supports(s):
                raise CurvatureError(
                    f"layer {path}: {self.block_of(path)!r} does not support "
                    f"{type(s).__name__}; name another block for it in `overrides`"
                )
        return _of_each(found, lambda path, s: self.block_of(path).input_moments(s, scale))

    def moments(self, statistics: Tree, scale: Scale) -> dict[str, Moments]:
        found = dict(trees.items(statistics))
        return _of_each(found, lambda path, s: self.block_of(path).moments(s, scale))

    def require_own(self, moments: Mapping[str, Moments]) -> None:
        strangers = [path for path, m in moments.items() if not self.block_of(path).owns(m)]
        if strangers:
            require_own(self.block_of(strangers[0]), moments, lambda path, _: path not in strangers)

    def matrix(self, moments: dict[str, Moments], params: Tree) -> BlockDiagonalMatrix:
        self.require_own(moments)

        def leaf(path: str, parameter: Array) -> Matrix:
            return self.block_of(path).matrix(moments[path], parameter.shape)

        return BlockDiagonalMatrix(trees.map_named(leaf, params))

    def block_traces(
        self, moments: dict[str, Moments], params: Tree, units: Mapping[str, Units] | None = None
    ) -> dict[str, Array]:
        self.require_own(moments)
        return {
            path: self.block_of(path).trace(moments[path], p.shape, (units or {}).get(path))
            for path, p in trees.items(params)
        }

    def units(self, moments: dict[str, Moments], params: Tree) -> dict[str, Units]:
        self.require_own(moments)
        found = {
            path: self.block_of(path).units(moments[path], p) for path, p in trees.items(params)
        }
        return {path: u for path, u in found.items() if u is not None}

    def mixes_units(self, moments: dict[str, Moments]) -> bool:
        return any(on_host(*(self.block_of(path).mixes_units(m) for path, m in moments.items())))

    def in_units(
        self, moments: dict[str, Moments], units: Mapping[str, Units]
    ) -> dict[str, Moments]:
        self.require_own(moments)
        return {
            path: self.block_of(path).in_units(m, units[path]) if path in units else m
            for path, m in moments.items()
        }

    def factorise(
        self,
        moments: dict[str, Moments],
        damping: float,
        previous: dict[str, Factors] | None = None,
    ) -> tuple[dict[str, Factors], list[LadderEvent]]:
        require_damping(damping)
        self.require_own(moments)

        def of_layer(path: str, ladder: Ladder) -> Factors:
            old = None if previous is None else previous.get(path)
            return self.block_of(path).factorise(moments[path], damping, ladder, old)

        arrays = [x for m in moments.values() for x in m.values()]
        operations = sum(2.0 * math.prod(x.shape) ** 1.5 for x in arrays)
        each = partial(side_by_side, operations=operations, arrays=arrays)
        return factorise_each(moments, of_layer, damping, each)

    def solve(self, factors: dict[str, Factors], v: Tree) -> Tree:
        return trees.map_named(lambda path, x: self.block_of(path).solve(factors[path], x), v)

    def solve_mean(
        self, factors: dict[str, Factors], statistics: Tree, scale: Scale, gradient: Tree
    ) -> Tree:
        def leaf(path: str, s: Any, x: Array) -> Array:
            return self.block_of(path).solve_mean(factors[path], s, scale, x)

        return trees.map_named(leaf, statistics, gradient)


def _of_each(
    statistics: Mapping[str, Any], function: Callable[[str, Any], Moments]
) -> dict[str, Moments]:
    """Apply `function` to each path and its statistics; an error names the layer."""
    moments = {}
    for path, s in statistics.items():
        try:
            moments[path] = function(path, s)
        except CurvatureError as error:
            raise error.within(f"layer {path}") from None
    return moments
