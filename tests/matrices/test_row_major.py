"""The order of entries, stated once: row-major vec pairs with G ⊗ A."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_close, host

from kfac_np import trees
from kfac_np.backend import Backend
from kfac_np.errors import ShapeError
from kfac_np.matrices import BlockDiagonalMatrix, DenseMatrix, DiagonalMatrix, KroneckerMatrix

sizes = st.integers(1, 6)


@given(d_out=sizes, d_in=sizes, seed=st.integers(0, 2**16))
def test_vec_of_a_product_is_the_kronecker_product_times_vec(
    backend: Backend, d_out: int, d_in: int, seed: int
):
    """(G ⊗ A) vec(V) = vec(G V A), vec row by row, for symmetric A and G."""
    draw = np.random.default_rng(seed).standard_normal
    A, G, V = draw((d_in, d_in)), draw((d_out, d_out)), draw((d_out, d_in))
    A, G = A + A.T, G + G.T
    product = KroneckerMatrix(backend.asarray(A), backend.asarray(G)).matvec(backend.asarray(V))
    # No tolerance for cancellation is needed when entries are compared with their parts' sizes.
    scale = np.abs(G) @ np.abs(V) @ np.abs(A)
    error = np.abs(host(product) - (np.kron(G, A) @ V.reshape(-1)).reshape(V.shape))
    assert np.all(error <= 1e-14 * scale)


def test_the_other_order_is_another_matrix(backend: Backend):
    A, G = np.diag([1.0, 2.0]), np.diag([1.0, 10.0])
    dense = host(KroneckerMatrix(backend.asarray(A), backend.asarray(G)).to_dense())
    np.testing.assert_array_equal(dense, np.kron(G, A))
    assert np.max(np.abs(dense - np.kron(A, G))) == 8.0


def test_dense_and_diagonal_take_entries_row_by_row(backend: Backend):
    V = backend.asarray(np.asarray([[1.0, 2.0], [3.0, 4.0]]))
    weights = np.asarray([1.0, 10.0, 100.0, 1000.0])
    expected = np.asarray([[1.0, 20.0], [300.0, 4000.0]])
    assert_close(DenseMatrix(backend.asarray(np.diag(weights)), (2, 2)).matvec(V), expected)
    diagonal = DiagonalMatrix(backend.asarray(weights.reshape(2, 2)))
    assert_close(diagonal.matvec(V), expected)
    assert_close(diagonal.to_dense(), np.diag(weights))


def test_blocks_follow_one_another_as_ravel_orders_them(backend: Backend):
    blocks = (
        DiagonalMatrix(backend.asarray(np.asarray([[1.0, 2.0]]))),
        {"b": (DiagonalMatrix(backend.asarray(np.asarray([3.0]))),)},
    )
    params = (backend.asarray(np.asarray([[1.0, 1.0]])), {"b": (backend.ones((1,)),)})
    matrix = BlockDiagonalMatrix(blocks)
    assert_close(matrix.to_dense(), np.diag([1.0, 2.0, 3.0]))
    assert_close(trees.ravel(matrix.matvec(params)), np.asarray([1.0, 2.0, 3.0]))


def test_wrong_shapes_are_refused(backend: Backend):
    with pytest.raises(ShapeError, match=r"A: expected a square matrix, got shape \(2, 3\)"):
        KroneckerMatrix(backend.zeros((2, 3)), backend.eye(2))
    with pytest.raises(ShapeError, match=r"G: expected a square matrix, got shape \(2,\)"):
        KroneckerMatrix(backend.eye(2), backend.zeros((2,)))
    with pytest.raises(ShapeError, match=r"array: expected shape \(6, 6\), got \(4, 4\)"):
        DenseMatrix(backend.eye(4), (2, 3))
    with pytest.raises(ShapeError, match="expected a tuple of 1, got a tuple of 2"):
        BlockDiagonalMatrix((DiagonalMatrix(backend.ones((1,))),)).matvec(
            (backend.ones((1,)), backend.ones((1,)))
        )
