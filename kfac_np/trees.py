"""Nested parameters: tuples, lists and dicts whose leaves are anything else (arrays, mostly).

A network's parameters, gradients, statistics and updates all have one structure, so that a
function of several trees walks them side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from kfac_np import backend
from kfac_np.backend import Array, Scalar, array_namespace, is_asynchronous
from kfac_np.errors import ShapeError

__all__ = [
    "Tree",
    "axpy",
    "combine",
    "inner",
    "items",
    "leaves",
    "map_named",
    "ravel",
    "scale",
    "select",
    "squared_norm",
    "tree_map",
    "unravel",
    "zeros_like",
]

Tree = Any  # a leaf, or a tuple, list or dict of trees
_SEQUENCES = (tuple, list)
_CONTAINERS = (tuple, list, dict)


def tree_map(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply `function` to corresponding leaves; the first tree decides what is a leaf.

    Raises
    ------
    ShapeError
        The structures differ.

    Examples
    --------
    >>> tree_map(lambda a, b: a + b, (1, {"w": 2}), (10, {"w": 20}))
    (11, {'w': 22})
    """
    return _map(lambda _, *xs: function(*xs), (), tree, rest)


def map_named(function: Callable[..., Any], tree: Tree, *rest: Tree, path: str = "") -> Tree:
    """Like `tree_map`, with the leaf's path ("0.w") as first argument.

    Examples
    --------
    >>> map_named(lambda name, x: f"{name}={x}", (1, {"w": 2}))
    ('0=1', {'w': '1.w=2'})
    """
    start = (path,) if path else ()
    return _map(lambda keys, *xs: function(_path(keys), *xs), start, tree, rest)


def _map(
    function: Callable[..., Any], keys: tuple[Any, ...], tree: Tree, rest: Sequence[Tree]
) -> Tree:
    """The keys that lead to a leaf come first; few functions need them joined to a path."""
    if isinstance(tree, dict):
        for other in rest:
            if not isinstance(other, dict) or other.keys() != tree.keys():
                raise _difference(keys, tree, other)
        return {k: _map(function, (*keys, k), v, [o[k] for o in rest]) for k, v in tree.items()}
    if isinstance(tree, _SEQUENCES):
        for other in rest:
            if not isinstance(other, _SEQUENCES) or len(other) != len(tree):
                raise _difference(keys, tree, other)
        parts = [_map(function, (*keys, i), v, [o[i] for o in rest]) for i, v in enumerate(tree)]
        return type(tree)(parts)
    return function(keys, tree, *rest)


def _path(keys: tuple[Any, ...]) -> str:
    path = ""
    for key in keys:
        path = f"{path}.{key}" if path else str(key)
    return path


def _difference(keys: tuple[Any, ...], tree: Tree, other: Tree) -> ShapeError:
    kind, came = type(tree).__name__, type(other).__name__
    size = f" of {len(other)}" if hasattr(other, "__len__") else ""
    return ShapeError(
        f"tree at {_path(keys) or 'its root'}: expected a {kind} of {len(tree)}, got a {came}{size}"
    )


def items(tree: Tree, path: str = "") -> list[tuple[str, Any]]:
    """List (path, leaf) in order.

    Examples
    --------
    >>> items((1, {"w": 2}, ()))
    [('0', 1), ('1.w', 2)]
    """
    if not isinstance(tree, _CONTAINERS):
        return [(path, tree)]
    children = tree.items() if isinstance(tree, dict) else enumerate(tree)
    before = f"{path}." if path else ""
    return [pair for key, child in children for pair in items(child, f"{before}{key}")]


def leaves(tree: Tree) -> list[Any]:
    """List the leaves in order.

    Examples
    --------
    >>> leaves((1, {"w": 2}))
    [1, 2]
    """
    if not isinstance(tree, _CONTAINERS):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree
    return [leaf for child in children for leaf in leaves(child)]


def scale(factor: Any, tree: Tree) -> Tree:
    """factor · tree.

    Examples
    --------
    >>> scale(2.0, (1.0, {"w": 3.0}))
    (2.0, {'w': 6.0})
    """
    return tree_map(lambda x: backend.factor_of(factor, x) * x, tree)


def axpy(factor: Any, x: Tree, y: Tree) -> Tree:
    """factor · x + y, as new arrays.

    Examples
    --------
    >>> axpy(2.0, (1.0,), (0.5,))
    (2.5,)
    """
    return combine(factor, x, 1.0, y)


def combine(a: Any, x: Tree, b: Any, y: Tree) -> Tree:
    """a · x + b · y, as new arrays.

    Examples
    --------
    >>> combine(0.75, (2.0,), 0.25, (4.0,))
    (2.5,)
    """
    return tree_map(lambda u, v: backend.combine(a, u, b, v), x, y)


def select(condition: Scalar, yes: Tree, no: Tree) -> Tree:
    """`yes` where the condition holds, else `no`, which has the same structure.

    Examples
    --------
    >>> import numpy as np
    >>> select(np.bool_(False), (np.ones(1),), (np.zeros(1),))
    (array([0.]),)
    """
    if not is_asynchronous(condition):
        return yes if condition else no
    xp = array_namespace(condition)
    return tree_map(lambda a, b: xp.where(condition, a, b), yes, no)


def where(condition: Scalar, tree: Tree) -> Tree:
    """`tree` where the condition holds, else zeros.

    Examples
    --------
    >>> import numpy as np
    >>> where(np.bool_(False), (np.ones(1),))
    (array([0.]),)
    """
    if not is_asynchronous(condition):
        return tree if condition else zeros_like(tree)
    xp = array_namespace(condition)
    return tree_map(lambda x: xp.where(condition, x, xp.zeros_like(x)), tree)


def zeros_like(tree: Tree) -> Tree:
    """Return zeros in the shape of `tree`.

    Examples
    --------
    >>> import numpy as np
    >>> zeros_like((np.ones(2),))
    (array([0., 0.]),)
    """
    return tree_map(lambda x: array_namespace(x).zeros_like(x), tree)


def inner(x: Tree, y: Tree) -> Array:
    """Sum over all entries of x · y (0-d array; nothing is copied to the host).

    Examples
    --------
    >>> import numpy as np
    >>> float(inner((np.ones(3), np.ones(2)), (np.ones(3), 2 * np.ones(2))))
    7.0
    """
    left = leaves(x)
    right = left if x is y else leaves(tree_map(lambda _, b: b, x, y))  # of one structure
    if not left:
        raise ShapeError("inner: expected a tree with at least one array, got an empty one")
    return backend.inner(left, right)


def squared_norm(tree: Tree) -> Array:
    """Sum of squares of all entries (0-d array).

    Examples
    --------
    >>> import numpy as np
    >>> float(squared_norm((np.ones(3), np.ones((2, 2)))))
    7.0
    """
    return inner(tree, tree)


def ravel(tree: Tree) -> Array:
    """Concatenate all leaves, each flattened row-major, into one vector.

    Examples
    --------
    >>> import numpy as np
    >>> ravel((np.zeros((1, 2)), {"b": np.ones(1)}))
    array([0., 0., 1.])
    """
    parts = leaves(tree)
    if not parts:
        raise ShapeError("ravel: expected a tree with at least one array, got an empty one")
    xp = array_namespace(*parts)
    return xp.concat([xp.reshape(p, (-1,)) for p in parts])


def unravel(vector: Array, like: Tree) -> Tree:
    """Cut a vector into the shapes of `like`: the inverse of `ravel`.

    Raises
    ------
    ShapeError
        The sizes differ.

    Examples
    --------
    >>> import numpy as np
    >>> unravel(np.asarray([1.0, 2.0, 3.0]), (np.zeros((1, 2)), np.zeros(1)))
    (array([[1., 2.]]), array([3.]))
    """
    total = sum(math.prod(leaf.shape) for leaf in leaves(like))
    if vector.shape != (total,):
        raise ShapeError(f"unravel: expected a vector of {total} entries, got shape {vector.shape}")
    xp = array_namespace(vector)
    start = 0

    def cut(leaf: Array) -> Array:
        nonlocal start
        size = math.prod(leaf.shape)
        start += size
        return xp.reshape(vector[start - size : start], leaf.shape)

    return tree_map(cut, like)
