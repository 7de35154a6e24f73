"""Kernels: the fast versions against the generic ones and against loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_close

from kfac_np.backend import Backend, append_ones, second_moment, sum_by_index, to_numpy
from kfac_np.backend.kernels import sum_by_index_generic


def by_loop(values: np.ndarray, indices: np.ndarray, size: int) -> np.ndarray:
    out = np.zeros((size, values.shape[1]))
    for value, i in zip(values, indices, strict=True):
        out[i] += value
    return out


@pytest.mark.parametrize("size", [1, 4, 300])
@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (7, 3), (50, 0), (200, 2)])
def test_sum_by_index(shape: tuple[int, int], size: int, backend: Backend):
    """Empty sums, indices that repeat, and such as never occur."""
    draw = np.random.default_rng(sum(shape) + size)
    values = draw.standard_normal(shape)
    indices = draw.integers(0, max(1, size // 2), shape[0])
    given = backend.asarray(values), backend.asarray(indices), size
    expected = by_loop(values, indices, size)
    for kernel in (sum_by_index, sum_by_index_generic):
        total = kernel(*given)
        assert total.shape == (size, shape[1])
        assert Backend.of(total) == backend
        np.testing.assert_allclose(to_numpy(total), expected, rtol=1e-13, atol=1e-13)


@given(
    indices=st.lists(st.integers(0, 5), max_size=12),
    columns=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_sum_by_index_whatever_the_indices(
    backend: Backend, indices: list[int], columns: int, seed: int
):
    values = np.random.default_rng(seed).standard_normal((len(indices), columns))
    where = np.asarray(indices, dtype=np.int64)
    fast, generic = (
        to_numpy(kernel(backend.asarray(values), backend.asarray(where), 6))
        for kernel in (sum_by_index, sum_by_index_generic)
    )
    np.testing.assert_allclose(fast, generic, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(fast, by_loop(values, where, 6), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", ["int32", "int64", "uint8"])
def test_sum_by_index_takes_all_integers(kind: str, backend: Backend):
    where = backend.asarray(np.asarray([2, 0, 2], dtype=kind))
    for kernel in (sum_by_index, sum_by_index_generic):
        total = kernel(backend.ones((3, 2)), where, 3)
        np.testing.assert_array_equal(to_numpy(total), [[1, 1], [0, 0], [2, 2]])


def test_sums_of_many_rows_are_cut_into_pieces(backend: Backend):
    """More rows than there are one-hot numbers at once for such a size."""
    size, rows = 2**20, 9
    where = backend.asarray(np.arange(rows) * 1000)
    total = to_numpy(sum_by_index_generic(backend.ones((rows, 1)), where, size))
    assert total.sum() == rows
    assert np.all(total[::1000][:rows] == 1)


def test_nothing_is_written_to(backend: Backend):
    values, where = backend.ones((3, 2)), backend.asarray(np.asarray([1, 1, 0]))
    before = to_numpy(values).copy()
    for kernel in (sum_by_index, sum_by_index_generic):
        kernel(values, where, 2)
        np.testing.assert_array_equal(to_numpy(values), before)


def test_second_moment_and_ones(backend: Backend):
    rows = np.random.default_rng(0).standard_normal((6, 3))
    w = np.random.default_rng(1).uniform(0.0, 2.0, 6)
    assert_close(second_moment(backend.asarray(rows)), rows.T @ rows)
    weighted = second_moment(backend.asarray(rows), backend.asarray(w))
    assert_close(weighted, np.einsum("r,ri,rj->ij", w, rows, rows))
    np.testing.assert_array_equal(
        to_numpy(append_ones(backend.asarray(rows))), np.column_stack([rows, np.ones(6)])
    )
