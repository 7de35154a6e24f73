"""`solve_mean` is `solve` of the mean gradient, also where it goes by examples."""

from __future__ import annotations

import pytest
from numerics import assert_close, host

from kfac_np import trees
from kfac_np.backend import Backend, Rng
from kfac_np.curvature import EKFAC, BlockDiagonal, KFACBlock
from kfac_np.fisher import Exact
from kfac_np.layers import Dense, Sequential, Tanh
from kfac_np.losses import SquaredError
from kfac_np.objective import Objective


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(2, 9), (3, 9), (2, 3, 9), (40, 9)], ids=str)
def test_few_examples_and_many(backend: Backend, shape: tuple[int, ...], weighted: bool):
    network = Sequential(Dense(9, 12), Tanh(), Dense(12, 7, bias=False))
    params = network.init(Rng(0), backend)
    x = Rng(1).normal(shape, backend)
    t = Rng(2).normal((*shape[:-1], 7), backend)
    weights = Rng(3).uniform(shape[:1], backend) if weighted else None
    e = Objective(network, SquaredError()).evaluate(params, x, t, weights)
    statistics, gradient = e.backward(e.output_gradient()), e.gradient()
    for curvature in (BlockDiagonal(), BlockDiagonal(KFACBlock(exact_damping=True)), EKFAC()):
        moments = curvature.estimate(e, Exact(), Rng(4))
        factors, _ = curvature.factorise(moments, 0.1)
        assert_close(
            trees.ravel(curvature.solve_mean(factors, statistics, e.scale, gradient)),
            host(trees.ravel(curvature.solve(factors, gradient))),
        )


def test_few_examples_are_taken_one_by_one(backend: Backend):
    """The gradient itself is not looked at where there are few examples, and is where many."""
    network = Dense(9, 12)
    params = network.init(Rng(0), backend)
    for n, by_examples in ((2, True), (40, False)):
        x, t = Rng(1).normal((n, 9), backend), Rng(2).normal((n, 12), backend)
        e = Objective(network, SquaredError()).evaluate(params, x, t)
        curvature = BlockDiagonal()
        factors, _ = curvature.factorise(curvature.estimate(e, Exact(), Rng(4)), 0.1)
        statistics = e.backward(e.output_gradient())
        zero = trees.zeros_like(params)
        solved = curvature.solve_mean(factors, statistics, e.scale, zero)
        assert bool(backend.xp.any(solved != 0)) is by_examples
