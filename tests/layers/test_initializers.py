"""Initial weights: moments, sparsity, and the same numbers everywhere."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from kfac_np.backend import Backend, Rng, get_backend, to_numpy
from kfac_np.layers import Dense, fan_in_normal, glorot, he, sparse

FAN_IN, FAN_OUT = 300, 200
VARIANCE = {
    glorot: 2.0 / (FAN_IN + FAN_OUT),
    he: 2.0 / FAN_IN,
    fan_in_normal: 1.0 / FAN_IN,
    sparse: 15.0 / FAN_IN,
}
INITIALIZERS = list(VARIANCE)


def name(initializer):
    return getattr(initializer, "__name__", repr(initializer))


@pytest.mark.parametrize("initializer", INITIALIZERS, ids=name)
def test_moments(initializer):
    n = FAN_IN * FAN_OUT
    w = to_numpy(initializer(Rng(3), FAN_IN, FAN_OUT, get_backend("numpy", "float64")))
    variance = VARIANCE[initializer]
    # Five standard errors: of a mean σ/√n, of a variance √((κ-1)/n) σ², where the kurtosis κ is 3
    # of a normal variable and 3/p of one that is zero except with probability p.
    kurtosis = 3.0 if initializer is not sparse else 3.0 * FAN_IN / 15
    assert abs(w.mean()) < 5 * (variance / n) ** 0.5
    assert abs(w.var() / variance - 1) < 5 * ((kurtosis - 1) / n) ** 0.5


@pytest.mark.parametrize("initializer", INITIALIZERS, ids=name)
@pytest.mark.parametrize("fans", [(1, 1), (3, 2), (2, 5), (40, 3)])
def test_the_same_on_every_backend(initializer, fans, backend: Backend):
    w = initializer(Rng(3, "w"), *fans, backend)
    assert w.shape == fans[::-1]
    assert Backend.of(w) == backend
    host = initializer(Rng(3, "w"), *fans, get_backend("numpy", "float64"))
    np.testing.assert_array_equal(to_numpy(w), host)
    other = initializer(Rng(4, "w"), *fans, backend)
    assert not np.array_equal(to_numpy(w), to_numpy(other))


@pytest.mark.parametrize("initializer", INITIALIZERS, ids=name)
def test_single_precision(initializer, backend: Backend):
    single = Backend(backend.xp, backend.device, backend.xp.float32)
    w = Dense(20, 30, initializer=initializer).init(Rng(1), single)
    assert w.dtype == backend.xp.float32
    double = Dense(20, 30, initializer=initializer).init(Rng(1), backend)
    # The same numbers, rounded; only the places of the sparse ones are drawn anew.
    if initializer is not sparse:
        np.testing.assert_allclose(to_numpy(w), to_numpy(double), rtol=1e-6)


@pytest.mark.parametrize("connections", [1, 15, 40, 100])
def test_sparse_counts(connections: int, backend: Backend, rng: Rng):
    w = to_numpy(sparse(rng, 40, 200, backend, connections=connections))
    np.testing.assert_array_equal(np.count_nonzero(w, axis=1), min(connections, 40))
    # Every input is as likely as any other: five standard errors of a binomial count.
    p = min(connections, 40) / 40
    uses = np.count_nonzero(w, axis=0)
    assert np.all(np.abs(uses - 200 * p) <= 5 * (200 * p * (1 - p)) ** 0.5)


def test_sparse_weights_are_standard_normal(rng: Rng):
    w = to_numpy(sparse(rng, 400, 400, get_backend("numpy", "float64")))
    drawn = w[w != 0]
    assert abs(drawn.mean()) < 5 / drawn.size**0.5
    assert abs(drawn.var() - 1) < 5 * (2 / drawn.size) ** 0.5


def test_settings_of_an_initializer(backend: Backend, rng: Rng):
    layer = Dense(40, 3, initializer=functools.partial(sparse, connections=7))
    w = to_numpy(layer.init(rng, backend))[:, :-1]
    np.testing.assert_array_equal(np.count_nonzero(w, axis=1), 7)
