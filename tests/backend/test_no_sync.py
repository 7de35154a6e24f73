"""Nothing between a forward pass and a product waits for the device.

On a GPU every conversion of an array to a Python number stops the host until all work queued so
far is done. array_api_strict can be made to raise there instead.
"""

from __future__ import annotations

import array_api_strict
import pytest
from cases import LAYERS, LOSSES, NETWORKS, LayerCase, LossCase, NetworkCase
from waiting import counted_syncs, no_sync

from kfac_np import products, trees
from kfac_np.backend import (
    Backend,
    Rng,
    all_finite,
    combine,
    get_backend,
    later,
    logistic,
    prefetch,
    second_moment,
    sum_by_index,
    to_numpy,
)
from kfac_np.fisher import Empirical, Exact, InputOnly, MonteCarlo
from kfac_np.losses import PoissonLogRate


@pytest.fixture(scope="module")
def strict() -> Backend:
    device = array_api_strict.Device("device1")
    return get_backend("array_api_strict", "float64", device)


def test_it_is_noticed(strict: Backend):
    one = strict.ones(())
    assert float(one) == 1.0
    with no_sync():
        for convert in (bool, float, int, to_numpy):
            with pytest.raises(AssertionError, match="the host waits"):
                convert(one)
        coming = later(2.0 * one)  # may be asked for, but not read
        with pytest.raises(AssertionError, match="the host waits"):
            coming.numpy()
    with no_sync(late_reads=True):
        assert later(2.0 * one).numpy() == 2.0
        with pytest.raises(AssertionError, match="the host waits"):
            float(one)
    assert bool(one)
    assert coming.numpy() == 2.0


def test_it_is_counted(strict: Backend):
    with counted_syncs() as found:
        assert all_finite(strict.ones((3,)))
        assert to_numpy(strict.ones((3,))).sum() == 3.0
        _ = 2.0 * strict.ones((3,))
    places = {place.partition(":")[0] for place in found}
    assert "array.py" in places
    assert found.total() >= 2


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layers(case: LayerCase, strict: Backend):
    params, x = case.build(strict)
    with no_sync():
        y, cache = case.layer.forward(params, x)
        _, statistics = case.layer.backward(params, cache, y)
        trees.tree_map(lambda s: (s.gradient(), s.per_example()), statistics)
        dx = None if case.classes else x
        case.layer.jvp(params, cache, dx, params)
        if case.has_hessian:
            case.layer.backward_jvp(params, cache, y, dx, params, y)


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_losses(case: LossCase, strict: Backend):
    z, t = case.build(strict)
    with no_sync():
        case.loss.value(z, t)
        case.loss.gradient(z, t)
        case.loss.hessian_product(z, z)
        case.loss.fisher_factor(z, 0, 1)
        if not isinstance(case.loss, PoissonLogRate):  # counts are drawn on the host
            case.loss.sample_targets(Rng(0), z)
            case.loss.sample_gradient(Rng(0), z)


def test_kernels(strict: Backend):
    """What layers and curvature are made of; convolutions and pooling are among the layers."""
    x, y = (Rng(k).normal((6, 3), strict) for k in (0, 1))
    with no_sync():
        second_moment(x)
        second_moment(x, x[:, 0])
        combine(0.5, x, strict.ones(()), y)
        sum_by_index(x, strict.asarray([0, 1, 0, 2, 2, 1]), 3)
        Rng(0).bernoulli(logistic(x))
        for batch in prefetch([([[1.0]], None)] * 3, strict):
            later(2.0 * batch[0])


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_networks(case: NetworkCase, strict: Backend):
    # Checking the batch waits, once; what follows from it does not.
    e, v = case.build(strict).evaluate(), case.tangent(strict)
    if case.coupled:  # a part of the batch is evaluated, and checked, anew
        e.take(case.fewest).gradient()
    sampled = [] if isinstance(case.loss, PoissonLogRate) else [MonteCarlo(2)]
    with no_sync():
        e.gradient()
        e.take(e.scale.examples if case.coupled else 1).gradient()
        products.ggn_product(e, v)
        products.hessian_product(e, v)
        products.quadratic_forms(e, [v, v])
        for fisher in (Empirical(), *sampled):
            products.fisher_product(e, v, fisher)
        for fisher in (Exact(1), Exact(), Empirical(), InputOnly(), *sampled):
            for _ in fisher.statistics(e, Rng(0)):
                pass
