"""One parameter, several uses: the statistics of all of them as those of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kfac_np import trees
from kfac_np.backend import Array, array_namespace
from kfac_np.errors import CurvatureError, InputError
from kfac_np.layers.base import Layer
from kfac_np.statistics import (
    AffineStatistics,
    ElementwiseStatistics,
    EmbeddingStatistics,
    GroupedStatistics,
    Statistics,
)
from kfac_np.trees import Tree

__all__ = ["merge_uses"]


def merge_uses(uses: Sequence[Statistics]) -> Statistics:
    """Statistics of a parameter used several times: every use has locations of its own.

    The chain rule adds the uses: a gradient, of the batch or of one example, is the sum of those of
    the uses. As the locations of a layer are added, too, uses are put side by side as locations,
    T = T_1 + T_2 + ... What a Kronecker-factored block makes of them is then its sharing rule:
    `expand` leaves out what is between two uses, `reduce` adds the uses before it squares. Exact
    blocks need no choice.

    Patches of a convolution are unfolded if there is more than one use.

    Parameters
    ----------
    uses : sequence of Statistics
        Of one kind, at least one, in the order of the forward pass.

    Returns
    -------
    Statistics
        Of that kind; the only use itself if there is one.

    Raises
    ------
    CurvatureError
        A kind of statistics that this rule does not know, or several kinds.

    References
    ----------
    Martens, Ba & Johnson 2018, "Kronecker-factored Curvature Approximations for Recurrent Neural
    Networks" (`expand` is their independence across time); Eschenhagen et al. 2023,
    arXiv:2311.00636, §3.

    Examples
    --------
    >>> import numpy as np
    >>> first = AffineStatistics(np.full((5, 1, 2), 1.0), np.full((5, 1, 1), 1.0))
    >>> second = AffineStatistics(np.full((5, 1, 2), 2.0), np.full((5, 1, 1), 3.0))
    >>> both = merge_uses([first, second])
    >>> both.num_locations, both.gradient() - first.gradient() - second.gradient()
    (2, array([[0., 0.]]))
    """
    if not uses:
        raise InputError("merge_uses: expected at least one use, got none")
    first = uses[0]
    if len(uses) == 1:
        return first
    kinds = {type(s).__name__: None for s in uses}
    if len(kinds) > 1:
        raise CurvatureError(f"merge_uses: expected one kind of statistics, got {', '.join(kinds)}")
    parts: Any = uses
    if isinstance(first, AffineStatistics):
        return AffineStatistics(_locations([s.a for s in parts]), _locations([s.g for s in parts]))
    if isinstance(first, GroupedStatistics):
        groups = zip(*(s.groups for s in parts), strict=True)
        merged: Any = tuple(merge_uses(group) for group in groups)
        return GroupedStatistics(merged)
    if isinstance(first, EmbeddingStatistics):
        indices = array_namespace(first.indices).concat([s.indices for s in parts], axis=1)
        return EmbeddingStatistics(indices, _locations([s.g for s in parts]), first.size)
    if isinstance(first, ElementwiseStatistics):
        x, g = _locations([s.x for s in parts]), _locations([s.g for s in parts])
        return ElementwiseStatistics(x, g, first.shift)
    raise CurvatureError(
        f"merge_uses: expected statistics of the library's own kinds for a parameter used "
        f"{len(uses)} times, got {type(first).__name__}"
    )


def merge_trees(uses: Sequence[Tree]) -> Tree:
    """`merge_uses` for every parameter of a layer."""
    return trees.tree_map(lambda *each: merge_uses(each), *uses)


def sum_trees(gradients: Sequence[Tree]) -> Tree:
    """The sum of the uses' gradients."""
    return trees.tree_map(lambda *each: sum(each[1:], start=each[0]), *gradients)


def require_uncoupled(name: str, layer: Layer, times: int | str) -> None:
    """Refuse several uses of a layer with batch statistics.

    Those of each use are others, so that no one layer is its form after training.
    """
    if layer.couples_examples:
        raise InputError(
            f"{name}: expected a layer used {times} times to have no batch statistics, which "
            f"differ from use to use; got {layer!r}"
        )


def _locations(arrays: list[Array]) -> Array:
    """Side by side along the axis of locations, the last but one."""
    return array_namespace(*arrays).concat(arrays, axis=-2)
