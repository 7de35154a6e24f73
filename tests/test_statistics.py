"""Statistics of every kind of layer: first moments, with and without the axes K and T."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_close

from kfac_np.backend import Backend, Rng, get_backend, to_numpy
from kfac_np.statistics import (
    AffineStatistics,
    ElementwiseStatistics,
    EmbeddingStatistics,
    GroupedStatistics,
    Scale,
    Statistics,
    term_gradients,
)


@pytest.mark.parametrize("t", [1, 4])
@pytest.mark.parametrize("k", [None, 0, 1, 3])
def test_moments(k: int | None, t: int, backend: Backend, rng: Rng):
    n, d_in, d_out = 5, 3, 2
    lead = () if k is None else (k,)
    a, g = rng.normal((n, t, d_in), backend), rng.normal((*lead, n, t, d_out), backend)
    s = AffineStatistics(a, g)
    assert (s.num_examples, s.num_locations, s.num_vectors) == (n, t, 1 if k is None else k)
    assert s.stacked_g.shape == (1 if k is None else k, n, t, d_out)
    each = np.einsum("...nto,nti->...noi", to_numpy(g), to_numpy(a))
    assert s.per_example().shape == each.shape
    assert s.gradient().shape == (*lead, d_out, d_in)
    if k != 0:
        assert_close(s.per_example(), each)
        assert_close(s.gradient(), each.sum(axis=-3))
        v = rng.normal((d_out, d_in), backend)
        assert_close(s.along(v), np.einsum("...oi,oi->...", each, to_numpy(v)))
    for array in (s.gradient(), s.per_example(), s.stacked_g):
        assert Backend.of(array) == backend


def test_the_stacked_derivatives_are_made_once(backend: Backend, rng: Rng):
    s = AffineStatistics(rng.normal((2, 1, 3), backend), rng.normal((2, 1, 2), backend))
    assert s.stacked_g is s.stacked_g


@given(
    sizes=st.tuples(*[st.integers(1, 4)] * 5),
    seed=st.integers(0, 99),
)
def test_statistics_of_parts_add_up(sizes: tuple[int, ...], seed: int):
    """Examples, locations and vectors are all summed over: cutting any axis changes nothing."""
    k, n, t, d_in, d_out = sizes
    b = get_backend("numpy", "float64")
    a, g = Rng(seed).normal((n, t, d_in), b), Rng(seed, 1).normal((k, n, t, d_out), b)
    whole = AffineStatistics(a, g).gradient()
    by_example = [AffineStatistics(a[i : i + 1], g[:, i : i + 1]).gradient() for i in range(n)]
    by_location = [
        AffineStatistics(a[:, i : i + 1], g[:, :, i : i + 1]).gradient() for i in range(t)
    ]
    by_vector = [AffineStatistics(a, g[i]).gradient() for i in range(k)]
    assert_close(sum(by_example), whole)
    assert_close(sum(by_location), whole)
    assert_close(np.stack(by_vector), whole)


Lead = tuple[int, ...]


def grouped(backend: Backend, lead: Lead, n: int, t: int) -> tuple[Statistics, np.ndarray]:
    """Statistics of two groups, and their per-example gradients on the host."""
    parts, expected = [], []
    for i in range(2):
        a = Rng(1, i).normal((n, t, 3), backend)
        g = Rng(2, i).normal((*lead, n, t, 2), backend)
        parts.append(AffineStatistics(a, g))
        expected.append(np.einsum("...nto,nti->...noi", to_numpy(g), to_numpy(a)))
    return GroupedStatistics(tuple(parts)), np.stack(expected, axis=-3)


def embedding(backend: Backend, lead: Lead, n: int, t: int) -> tuple[Statistics, np.ndarray]:
    """Indices that repeat within an example and between examples, and one that never occurs."""
    indices = np.random.default_rng(3).integers(0, 3, (n, t))
    g = Rng(4).normal((*lead, n, t, 2), backend)
    one_hot = np.eye(4)[indices]
    expected = np.einsum("...nto,nti->...noi", to_numpy(g), one_hot)
    return EmbeddingStatistics(backend.asarray(indices), g, 4), expected


def elementwise(backend: Backend, lead: Lead, n: int, t: int) -> tuple[Statistics, np.ndarray]:
    x, g = Rng(5).normal((n, t, 3), backend), Rng(6).normal((*lead, n, t, 3), backend)
    expected = np.stack(
        [np.einsum("...ntc,ntc->...nc", to_numpy(g), to_numpy(x)), to_numpy(g).sum(-2)], axis=-2
    )
    return ElementwiseStatistics(x, g, True), expected


def without_shift(backend: Backend, lead: Lead, n: int, t: int) -> tuple[Statistics, np.ndarray]:
    s, expected = elementwise(backend, lead, n, t)
    return ElementwiseStatistics(s.x, s.g, False), expected[..., :1, :]


KINDS = [grouped, embedding, elementwise, without_shift]


@pytest.mark.parametrize("t", [1, 4])
@pytest.mark.parametrize("k", [None, 0, 1, 3])
@pytest.mark.parametrize("make", KINDS)
def test_moments_of_every_kind(make, k: int | None, t: int, backend: Backend):
    n, lead = 5, () if k is None else (k,)
    s, each = make(backend, lead, n, t)
    assert (s.num_examples, s.num_vectors) == (n, 1 if k is None else k)
    assert s.parameter_shape == each.shape[len(lead) + 1 :]
    assert s.gradient().shape == (*lead, *s.parameter_shape)
    assert s.per_example().shape == each.shape
    if k != 0:
        assert_close(s.per_example(), each)
        assert_close(s.gradient(), each.sum(axis=len(lead)))
        v = Rng(9).normal(s.parameter_shape, backend)
        along = s.along(v)
        assert along.shape == (*lead, n)
        products = each * to_numpy(v)
        assert_close(along, products.reshape(*products.shape[: len(lead) + 1], -1).sum(axis=-1))
    for array in (s.gradient(), s.per_example()):
        assert Backend.of(array) == backend


@pytest.mark.parametrize("k", [None, 0, 2])
@pytest.mark.parametrize("make", KINDS)
def test_rows_that_are_squared(make, k: int | None, backend: Backend):
    """One a vector and example; where examples are coupled the batch is one example."""
    n, lead = 3, () if k is None else (k,)
    s, each = make(backend, lead, n, 2)
    vectors, size = 1 if k is None else k, int(np.prod(s.parameter_shape))
    rows = term_gradients(s, Scale(n, n))
    coupled = term_gradients(s, Scale(n, n, coupled=True))
    assert rows.shape == (vectors * n, size)
    assert coupled.shape == (vectors, size)
    if vectors:
        assert_close(rows, each.reshape(-1, size))
        assert_close(coupled, each.sum(axis=len(lead)).reshape(-1, size))


def test_an_embedding_is_an_affine_layer_of_one_hot_inputs(backend: Backend):
    s, _ = embedding(backend, (2,), 3, 4)
    one_hot = backend.asarray(np.eye(4)[to_numpy(s.indices)])
    affine = AffineStatistics(one_hot, s.g)
    assert_close(s.gradient(), affine.gradient())
    assert_close(s.per_example(), affine.per_example())
