"""Statistics of affine layers: first moments, with and without the axes K and T."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_close

from kfac_np.backend import Backend, Rng, get_backend, to_numpy
from kfac_np.statistics import AffineStatistics


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
