"""Dropout: one stream is one mask, whatever is done with it."""

from __future__ import annotations

import numpy as np
import pytest
from numerics import assert_close

from kfac_np import products, trees
from kfac_np.backend import Backend, Rng, to_numpy
from kfac_np.errors import InputError
from kfac_np.layers import BatchNorm, Dense, Dropout, Flatten, Residual, Sequential, Tanh
from kfac_np.losses import SoftmaxCrossEntropy, SquaredError
from kfac_np.objective import Objective


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_masks_are_zero_or_the_inverse_of_what_is_kept(rate: float, backend: Backend):
    n = 4000
    y = to_numpy(Dropout(rate).forward((), backend.ones((n, 3)), Rng(0))[0])
    kept = y != 0.0
    np.testing.assert_allclose(y[kept], 1.0 / (1.0 - rate), rtol=1e-15)
    # Five standard errors of a binomial frequency.
    assert abs(kept.mean() - (1.0 - rate)) < 5 * (rate * (1.0 - rate) / (3 * n)) ** 0.5


def test_one_stream_is_one_mask(backend: Backend):
    """Equal streams draw the same, and the same stream goes on."""
    layer, x, rng = Dropout(0.5), backend.ones((20, 3)), Rng(4, "forward", 7)
    y, mask = (to_numpy(a) for a in layer.forward((), x, rng))
    np.testing.assert_array_equal(y, mask)
    for stream in (rng.child(), Rng(4, "forward", 7)):
        np.testing.assert_array_equal(to_numpy(layer.forward((), x, stream)[0]), y)
    for stream in (rng, Rng(4, "forward", 8), Rng(5, "forward", 7)):
        assert not np.array_equal(to_numpy(layer.forward((), x, stream)[0]), y)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_first_examples_have_the_mask_that_they_have_alone(precision: str, backend: Backend):
    """So that a part of a batch is the same function, cut or forwarded again."""
    b = Backend(backend.xp, backend.device, getattr(backend.xp, precision))
    whole, part = (to_numpy(Dropout(0.4).forward((), b.ones((n, 3, 5)), Rng(1))[0]) for n in (7, 3))
    np.testing.assert_array_equal(whole[:3], part)


def test_every_backend_draws_the_same(backend: Backend):
    y = to_numpy(Dropout(0.3).forward((), backend.ones((5, 4)), Rng(2))[0])
    expected = np.where(Rng(2).child("mask")._generator.random((5, 4)) >= 0.3, 1.0 / 0.7, 0.0)
    np.testing.assert_allclose(y, expected, rtol=1e-15)


def test_layers_of_a_network_have_masks_of_their_own(backend: Backend):
    net = Sequential(Dropout(0.5), Residual(Dropout(0.5)), Dropout(0.5))
    _, (first, (second,), third) = net.forward(((), (), ()), backend.ones((9, 9)), Rng(0))
    masks = [to_numpy(m) for m in (first, second, third)]
    assert not any(np.array_equal(masks[i], masks[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_without_random_numbers_it_is_the_identity(backend: Backend):
    x = backend.asarray(np.random.default_rng(0).standard_normal((4, 3)))
    for y, cache in (
        Dropout(0.5).forward((), x),
        Dropout(0.0).forward((), x, Rng(0)),
    ):
        np.testing.assert_array_equal(to_numpy(y), to_numpy(x))
        assert cache == ()
    fixed, y = Dropout(0.5).evaluation((), x)
    assert fixed == Dropout(0.5)
    np.testing.assert_array_equal(to_numpy(y), to_numpy(x))


NETWORK = Sequential(Dense(3, 6), Tanh(), Dropout(0.5), Dense(6, 2))
COUPLED = Sequential(Dense(3, 6), BatchNorm(6), Tanh(), Dropout(0.5), Dense(6, 2))


def problem(network: Sequential, backend: Backend, n: int = 8):
    params = network.init(Rng(0), backend)
    x, t = Rng(1).normal((n, 3), backend), Rng(2).normal((n, 2), backend)
    return Objective(network, SquaredError()), params, x, t


@pytest.mark.parametrize("network", [NETWORK, COUPLED], ids=repr)
def test_a_part_of_a_batch_keeps_its_masks(network: Sequential, backend: Backend):
    objective, params, x, t = problem(network, backend)
    e = objective.evaluate(params, x, t, rng=Rng(3))
    part = objective.evaluate(params, x[:3, ...], t[:3, ...], rng=Rng(3))
    taken = e.take(3)
    assert taken.value == part.value
    assert_close(taken.gradient(), part.gradient())
    v = network.init(Rng(9), backend)
    assert_close(taken.jvp(v), part.jvp(v))
    assert_close(taken.take(2).gradient(), e.take(2).gradient())
    without = objective.evaluate(params, x, t)
    assert e.value != pytest.approx(without.value, rel=1e-3)


@pytest.mark.parametrize("network", [NETWORK, COUPLED], ids=repr)
def test_derivatives_are_those_of_the_masked_network(network: Sequential, backend: Backend):
    """Dropping a unit is a weight of zero above it, and scaling the others scales theirs."""
    objective, params, x, t = problem(network, backend, n=5)
    e = objective.evaluate(params, x, t, rng=Rng(3))
    h, v = 1e-6, network.init(Rng(9), backend)

    def moved(step: float):
        return objective.evaluate(trees.axpy(step, v, params), x, t, rng=Rng(3))

    slope = float(trees.inner(e.gradient(), v))
    assert (moved(h).value - moved(-h).value) / (2 * h) == pytest.approx(slope, rel=1e-7)
    dz = (to_numpy(moved(h).outputs) - to_numpy(moved(-h).outputs)) / (2 * h)
    assert_close(e.jvp(v), dz, 1e-8)
    form = float(products.quadratic_forms(e, [v])[0, 0])
    assert form == pytest.approx((dz**2).sum() / 5, rel=1e-7)
    change = trees.axpy(-1.0, moved(-h).gradient(), moved(h).gradient())
    assert_close(products.hessian_product(e, v), trees.scale(0.5 / h, change), 1e-7)


def test_the_mean_over_masks_of_a_linear_network_is_the_network(backend: Backend):
    network = Sequential(Flatten(), Dropout(0.5), Dense(3, 2))
    params, x = network.init(Rng(0), backend), Rng(1).normal((2, 3), backend)
    draws = np.stack([to_numpy(network.forward(params, x, Rng(7, i))[0]) for i in range(800)])
    allowed = 5 * draws.std(axis=0) / 800**0.5
    assert np.all(np.abs(draws.mean(axis=0) - to_numpy(network.forward(params, x)[0])) < allowed)


def test_sampled_targets_follow_the_masked_network(backend: Backend):
    network = Sequential(Dropout(0.5), Dense(3, 2))
    objective = Objective(network, SoftmaxCrossEntropy())
    params, x = network.init(Rng(0), backend), Rng(1).normal((6, 3), backend)
    t = backend.asarray(np.asarray([0, 1, 0, 1, 0, 1]))
    e = objective.evaluate(params, x, t, rng=Rng(5))
    expected = network.forward(params, x, Rng(5))[0]
    np.testing.assert_array_equal(to_numpy(e.outputs), to_numpy(expected))


@pytest.mark.parametrize("rate", [1.0, -0.1, 1.5, float("nan"), True])
def test_rates_out_of_range(rate: float):
    with pytest.raises(InputError, match=r"Dropout rate: expected a number in \[0, 1\), got"):
        Dropout(rate)
