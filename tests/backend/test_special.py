"""Special functions against the standard library, and where exponentials overflow."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kfac_np.backend import (
    Backend,
    append_ones,
    erf,
    logistic,
    logsumexp,
    second_moment,
    softmax,
    softplus,
    to_numpy,
)
from kfac_np.backend.special import erf_generic

EPS = float(np.finfo(np.float64).eps)
GRID = np.concatenate(
    [np.linspace(-8, 8, 4001), [0.0, 2.0, -2.0, 1e-300, -1e-10, 1e4, -1e4, 1e300]]
)


@pytest.mark.parametrize("function", [erf, erf_generic])
def test_erf(function, backend: Backend):
    expected = np.asarray([math.erf(x) for x in GRID])
    found = to_numpy(function(backend.asarray(GRID)))
    # Relative, so that the line through zero is right, too.
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("function", [erf, erf_generic])
def test_erf_of_what_is_no_number(function, backend: Backend):
    found = to_numpy(function(backend.asarray([math.nan, math.inf, -math.inf])))
    assert math.isnan(found[0])
    assert found[1:].tolist() == [1.0, -1.0]


@pytest.mark.parametrize("function", [erf, erf_generic])
def test_erf_in_single_precision(function, backend: Backend):
    xp = backend.xp
    found = function(xp.astype(backend.asarray(GRID[:-1]), xp.float32))
    assert found.dtype == xp.float32
    expected = np.asarray([math.erf(x) for x in GRID[:-1].astype(np.float32)])
    # Some dozen roundings of 6e-8.
    np.testing.assert_allclose(to_numpy(found), expected, rtol=2e-6, atol=1e-30)


def test_erf_of_every_shape(backend: Backend):
    for shape in ((), (0,), (2, 0, 3), (2, 3, 4)):
        assert erf(backend.zeros(shape)).shape == shape


EXTREME = [-1e300, -1e4, -800.0, -40.0, -1.0, -1e-300, 0.0, 1e-300, 1.0, 40.0, 800.0, 1e4, 1e300]


def test_logistic(backend: Backend):
    def exact(x: float) -> float:
        return 1 / (1 + math.exp(-x)) if x > -700 else 0.0

    found = to_numpy(logistic(backend.asarray(EXTREME)))
    # Absolutely: as (1 + tanh)/2 a tiny probability is known to within a rounding of 1.
    np.testing.assert_allclose(found, [exact(x) for x in EXTREME], rtol=0, atol=2 * EPS)
    assert found[0] == 0.0
    assert found[-1] == 1.0


def test_logistic_is_symmetric(backend: Backend, rng):
    x = 5.0 * rng.normal((200,), backend)
    np.testing.assert_allclose(to_numpy(logistic(x) + logistic(-x)), 1.0, rtol=0, atol=2 * EPS)


def test_softplus(backend: Backend):
    def exact(x: float) -> float:
        return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(max(x, -1e4)))

    found = to_numpy(softplus(backend.asarray(EXTREME)))
    np.testing.assert_allclose(found, [exact(x) for x in EXTREME], rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4, 1e300])
def test_logsumexp_and_softmax(shift: float, backend: Backend):
    x = np.asarray([[0.0, 1.0, -2.0], [3.0, 3.0, 3.0]])
    z = backend.asarray(x + shift)
    seen = to_numpy(z) - to_numpy(z).max(axis=1, keepdims=True)  # x, as the shift left it
    sums = np.exp(seen).sum(axis=1, keepdims=True)
    found = to_numpy(logsumexp(z))
    assert found.shape == (2, 1)
    np.testing.assert_allclose(
        found, to_numpy(z).max(axis=1, keepdims=True) + np.log(sums), rtol=4 * EPS
    )
    np.testing.assert_allclose(to_numpy(softmax(z)), np.exp(seen) / sums, rtol=8 * EPS)


def test_logsumexp_and_softmax_of_extremes(backend: Backend):
    z = backend.asarray([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e300, 0.0, -1e300]])
    assert to_numpy(softmax(z)).tolist() == [[1, 0, 0], [1 / 3] * 3, [1, 0, 0]]
    np.testing.assert_allclose(
        to_numpy(logsumexp(z))[:, 0], [1e4, -1e4 + math.log(3), 1e300], rtol=EPS
    )


def test_other_axes_are_kept(backend: Backend, rng):
    z = rng.normal((2, 3, 4), backend)
    assert logsumexp(z).shape == (2, 3, 1)
    np.testing.assert_allclose(to_numpy(softmax(z)).sum(axis=-1), 1.0, rtol=4 * EPS)


@pytest.mark.parametrize("function", [logistic, softplus, logsumexp, softmax, erf])
def test_arguments_are_left_alone_and_precision_kept(function, backend: Backend, rng):
    xp = backend.xp
    x = rng.normal((3, 4), backend)
    before = np.array(to_numpy(x))
    function(x)
    np.testing.assert_array_equal(to_numpy(x), before)
    single = function(xp.astype(x, xp.float32))
    assert single.dtype == xp.float32
    np.testing.assert_allclose(to_numpy(single), to_numpy(function(x)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2,), (5, 1), (3, 0, 2), (2, 3, 4)])
def test_append_ones(shape, backend: Backend, rng):
    x = rng.normal(shape, backend)
    found = to_numpy(append_ones(x))
    assert found.shape == (*shape[:-1], shape[-1] + 1)
    np.testing.assert_array_equal(found[..., :-1], to_numpy(x))
    np.testing.assert_array_equal(found[..., -1], 1.0)
    assert Backend.of(append_ones(x)) == backend


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_second_moment(rows: int, backend: Backend, rng):
    x, w = rng.normal((rows, 3), backend), rng.uniform((rows,), backend)
    host, weights = to_numpy(x), to_numpy(w)
    np.testing.assert_allclose(to_numpy(second_moment(x)), host.T @ host, rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(
        to_numpy(second_moment(x, w)), (host.T * weights) @ host, rtol=1e-13, atol=1e-15
    )
    found = to_numpy(second_moment(x))
    np.testing.assert_allclose(found, found.T, rtol=1e-14)
