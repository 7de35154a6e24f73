"""Comparisons on the host, with a tolerance that is stated as a number of roundings."""

from __future__ import annotations

from typing import Any

import numpy as np

from kfac_np import trees
from kfac_np.backend import to_numpy
from kfac_np.trees import Tree

EPS = float(np.finfo(np.float64).eps)


def host(tree: Tree) -> np.ndarray[Any, Any]:
    """An array as it is, a tree ravelled, on the host."""
    if isinstance(tree, tuple | list | dict):
        tree = trees.ravel(tree)
    return np.asarray(tree) if isinstance(tree, float | int) else to_numpy(tree)


def numbers(values: Any) -> Any:
    """Numbers, or lists, tuples and dicts of them, as floats; on a GPU they are 0-d arrays."""
    if isinstance(values, list | tuple):
        return type(values)(map(numbers, values))
    if isinstance(values, dict):
        return {name: numbers(x) for name, x in values.items()}
    return float(values)


def flat(tree: Tree) -> np.ndarray[Any, Any]:
    """All entries as one vector on the host, row by row and leaf by leaf."""
    return host(tree).reshape(-1)


def relative_error(actual: Tree, expected: Tree) -> float:
    """Largest error of an entry, relative to the largest entry expected."""
    a, b = host(actual), host(expected)
    assert a.shape == b.shape, f"expected shape {b.shape}, got {a.shape}"
    top = float(np.max(np.abs(b)))
    return float(np.max(np.abs(a - b))) / (top if top > 0 else 1.0)


def assert_close(actual: Tree, expected: Tree, tolerance: float = 1e-12) -> None:
    """Every entry within `tolerance` of the largest entry expected.

    The default is some 4,500 roundings of float64: enough for sums of a few hundred terms and for
    condition numbers of a few hundred, and for nothing worse.
    """
    error = relative_error(actual, expected)
    assert error <= tolerance, f"relative error {error:.3g} exceeds {tolerance:.3g}"


def frobenius_distance(actual: Tree, expected: Tree) -> float:
    """‖actual - expected‖_F / ‖expected‖_F."""
    a, b = host(actual), host(expected)
    assert a.shape == b.shape, f"expected shape {b.shape}, got {a.shape}"
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
