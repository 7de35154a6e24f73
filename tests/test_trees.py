"""Trees of parameters: structure is kept, paths are right, differences are noticed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_close

from kfac_np import trees
from kfac_np.backend import Backend, get_backend, to_numpy
from kfac_np.errors import ShapeError


def example(backend: Backend) -> trees.Tree:
    """Tuples, lists and dicts, with empty ones between."""
    return (
        backend.asarray([[1.0, 2.0], [3.0, 4.0]]),
        (),
        {"b": backend.asarray([5.0]), "a": [backend.asarray([[6.0]])]},
        [(), backend.asarray([7.0, 8.0])],
    )


leaf = st.lists(st.integers(0, 3), max_size=3).map(
    lambda shape: np.arange(float(np.prod(shape, dtype=int))).reshape(shape)
)
any_tree = st.recursive(
    leaf,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)


def structure(tree: trees.Tree):
    """The tree with shapes for leaves."""
    return trees.tree_map(np.shape, tree)


@given(any_tree)
def test_map_keeps_the_structure(tree):
    assert structure(trees.tree_map(lambda x: x + 1, tree)) == structure(tree)
    assert structure(trees.zeros_like(tree)) == structure(tree)
    assert [p for p, _ in trees.items(tree)] == trees.leaves(trees.map_named(lambda p, _: p, tree))
    assert len(trees.leaves(tree)) == len(list(trees.items(tree)))


@given(any_tree.filter(trees.leaves))
def test_unravel_is_the_inverse_of_ravel(tree):
    vector = trees.ravel(tree)
    assert vector.shape == (sum(x.size for x in trees.leaves(tree)),)
    back = trees.unravel(vector, tree)
    assert structure(back) == structure(tree)
    assert all(
        np.array_equal(a, b) for a, b in zip(trees.leaves(back), trees.leaves(tree), strict=True)
    )
    np.testing.assert_array_equal(vector, np.concatenate([x.ravel() for x in trees.leaves(tree)]))


@given(any_tree.filter(trees.leaves), st.floats(-3, 3))
def test_vector_space(tree, factor: float):
    v = trees.ravel(tree)
    np.testing.assert_array_equal(trees.ravel(trees.scale(factor, tree)), factor * v)
    np.testing.assert_array_equal(trees.ravel(trees.axpy(factor, tree, tree)), factor * v + v)
    assert float(trees.squared_norm(tree)) == pytest.approx(float(v @ v), rel=1e-14)


def test_paths(backend: Backend):
    assert [path for path, _ in trees.items(example(backend))] == ["0", "2.b", "2.a.0", "3.1"]
    assert [path for path, _ in trees.items(backend.ones((1,)))] == [""]
    assert list(trees.items(((), {}, []))) == []
    assert list(trees.items(None)) == [("", None)]


def test_on_every_backend(backend: Backend):
    tree = example(backend)
    assert to_numpy(trees.ravel(tree)).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert float(trees.inner(tree, trees.scale(2.0, tree))) == 2 * 204.0
    back = trees.unravel(trees.ravel(tree), tree)
    assert [type(part) for part in back[1:]] == [tuple, dict, list]
    assert_close(trees.axpy(-1.0, back, tree), trees.zeros_like(tree))
    for x in trees.leaves(trees.zeros_like(tree)):
        assert Backend.of(x) == backend


def test_axpy_makes_new_arrays(backend: Backend):
    x, y = (backend.ones((2,)),), (backend.ones((2,)),)
    out = trees.axpy(1.0, x, y)
    out[0][...] = 5.0
    assert to_numpy(x[0]).tolist() == to_numpy(y[0]).tolist() == [1.0, 1.0]
    same = trees.axpy(2.0, x, x)
    assert to_numpy(same[0]).tolist() == [3.0, 3.0]


def test_strided_leaves(backend: Backend):
    wide = backend.asarray(np.arange(12.0).reshape(3, 4))
    assert to_numpy(trees.ravel((wide[::2, ::2], wide[0, :]))).tolist() == [0, 2, 8, 10, 0, 1, 2, 3]
    assert float(trees.inner((wide.T,), (wide.T,))) == float(np.sum(np.arange(12.0) ** 2))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((1, (2,)), "tree at 1: expected a dict of 1, got a tuple of 1"),
        ((1, {"v": 2}), "tree at 1: expected a dict of 1, got a dict of 1"),
        ((1,), "tree at its root: expected a tuple of 2, got a tuple of 1"),
        ({"w": 2}, "tree at its root: expected a tuple of 2, got a dict of 1"),
        (3.0, "tree at its root: expected a tuple of 2, got a float"),
        (None, "tree at its root: expected a tuple of 2, got a NoneType"),
    ],
)
def test_other_structure(other, message: str):
    with pytest.raises(ShapeError) as error:
        trees.tree_map(lambda *_: 0, (1, {"w": 2}), other)
    assert str(error.value) == message


def test_a_list_matches_a_tuple():
    # Files have no tuples; the first tree decides.
    assert trees.tree_map(lambda a, b: a + b, (1, [2]), [10, (20,)]) == (11, [22])


def test_trees_without_arrays():
    with pytest.raises(ShapeError, match="ravel: expected a tree with at least one array"):
        trees.ravel(((), {}))
    with pytest.raises(ShapeError, match="inner: expected a tree with at least one array"):
        trees.inner((), ())
    assert trees.scale(2.0, ((), {})) == ((), {})


@pytest.mark.parametrize("size", [0, 7, 9])
def test_vectors_of_the_wrong_size(size: int, backend: Backend):
    with pytest.raises(ShapeError, match="unravel: expected a vector of 8 entries, got shape"):
        trees.unravel(backend.ones((size,)), example(backend))
    with pytest.raises(ShapeError, match="unravel: expected a vector of 8 entries"):
        trees.unravel(backend.ones((8, 1)), example(backend))


def test_single_precision_stays_single():
    backend = get_backend("numpy", "float32")
    tree = example(backend)
    for result in (
        trees.scale(2.0, tree),
        trees.axpy(2.0, tree, tree),
        trees.ravel(tree),
        trees.inner(tree, tree),
        trees.unravel(trees.ravel(tree), tree),
    ):
        assert all(np.asarray(x).dtype == np.float32 for x in trees.leaves(result))
