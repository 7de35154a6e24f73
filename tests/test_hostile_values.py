"""Numbers too large or too small for the arithmetic: the library's own error, or a good result.

Under `numpy.seterr(all="raise")`, so that a NumPy error anywhere on the way is one of the test's,
as are warnings. On NumPy alone: it is its errors that are in question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest

from kfac_np import products, trees
from kfac_np.backend import Array, Backend, Rng, all_finite, get_backend
from kfac_np.curvature import (
    EKFAC,
    BlockDiagonal,
    BlockTridiagonal,
    Curvature,
    DiagonalBlock,
    FullKronecker,
    FullMatrix,
    quality,
)
from kfac_np.errors import DivergenceError, InputError, KfacError
from kfac_np.fisher import Empirical, Exact, MonteCarlo
from kfac_np.layers import GELU, Dense, LayerNorm, Sequential, SiLU, Softplus, Tanh
from kfac_np.losses import (
    Loss,
    PoissonLogRate,
    SigmoidCrossEntropy,
    SoftmaxCrossEntropy,
    SquaredError,
)
from kfac_np.objective import Objective
from kfac_np.optimizers import KFAC, SGD, Adam, Balance, practical
from kfac_np.trees import Tree

OBJECTIVES = [
    Objective(Sequential(Dense(3, 4), Tanh(), Dense(4, 2)), SquaredError()),
    Objective(
        Sequential(Dense(3, 4), LayerNorm(4, affine=False), GELU(), Dense(4, 2)),
        SigmoidCrossEntropy(),
    ),
    Objective(Sequential(Dense(3, 4), SiLU(), Dense(4, 2)), SoftmaxCrossEntropy()),
    Objective(Sequential(Dense(3, 4), Softplus(), Dense(4, 2)), PoissonLogRate()),
]
OPTIMIZERS: list[Callable[[Objective], Any]] = [
    KFAC,
    lambda objective: KFAC(objective, curvature=EKFAC(), fisher=Exact()),
    lambda objective: KFAC(objective, balance=Balance(1, 1)),
    practical,
    SGD,
    Adam,
]
CURVATURES: list[Curvature] = [
    BlockDiagonal(),
    BlockDiagonal(DiagonalBlock()),
    EKFAC(),
    BlockTridiagonal(split=True),
    FullKronecker(),
    FullMatrix(),
]
LARGE, SMALL = {"float32": 1e25, "float64": 1e200}, {"float32": 1e-43, "float64": 1e-320}
SIZES: dict[str, tuple[dict[str, float], ...]] = {
    # of inputs, targets, parameters
    "ordinary": ({}, {}, {}),
    "large inputs": (LARGE, {}, {}),
    "large targets": ({}, LARGE, {}),
    "large parameters": ({}, {}, LARGE),
    "all large": (LARGE, LARGE, LARGE),
    "small inputs": (SMALL, {}, {}),
    "small parameters": ({}, {}, SMALL),
    "all small": (SMALL, SMALL, SMALL),
}


def targets(loss: Loss, size: float) -> Any:
    draws = np.random.default_rng(1)
    if isinstance(loss, SoftmaxCrossEntropy):
        return draws.integers(0, 2, 6)
    return size * draws.uniform(0.0, 1.0, (6, 2))


@contextmanager
def own_errors_only(kind: str) -> Iterator[None]:
    """Let the library's errors pass, but where there is no reason for any."""
    with np.errstate(all="raise"), suppress(() if kind == "ordinary" else KfacError):
        yield


@pytest.fixture(params=["float32", "float64"])
def place(request: pytest.FixtureRequest) -> Backend:
    return get_backend("numpy", request.param)


def problems(kind: str, place: Backend) -> Iterator[tuple[Objective, Tree, Array, Array]]:
    precision = str(place.dtype).rpartition(".")[2]
    of_x, of_t, of_params = (size.get(precision, 1.0) for size in SIZES[kind])
    for objective in OBJECTIVES:
        x = place.asarray(of_x * np.random.default_rng(0).uniform(-1.0, 1.0, (6, 3)))
        t = place.asarray(targets(objective.loss, of_t))
        params = trees.scale(of_params, objective.network.init(0, place))
        yield objective, params, x, t


@pytest.mark.parametrize("kind", SIZES)
def test_steps(kind: str, place: Backend):
    for objective, params, x, t in problems(kind, place):
        for make in OPTIMIZERS:
            with own_errors_only(kind):
                optimizer = make(objective)
                state = optimizer.init(params)
                for _ in range(2):
                    state, report = optimizer.step(state, x, t)
                    assert np.isfinite(report.loss)
                    assert all_finite(*trees.leaves(state.params))


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_loss_that_overflows_is_named(make: Callable[[Objective], Any]):
    place = get_backend("numpy", "float32")
    objective = Objective(Dense(3, 3), SquaredError())
    optimizer = make(objective)
    state = optimizer.init(objective.network.init(0, place))
    with np.errstate(all="raise"), pytest.raises(DivergenceError, match="step 1: the loss is inf"):
        optimizer.step(state, place.ones((6, 3)), place.asarray(np.full((6, 3), 1e25)))
    with np.errstate(all="raise"), pytest.raises(InputError, match="x: expected finite values"):
        optimizer.step(state, place.asarray(np.full((6, 3), 1e300)), place.ones((6, 3)))


@pytest.mark.parametrize("kind", SIZES)
def test_derivatives_and_curvatures(kind: str, place: Backend):
    for objective, params, x, t in problems(kind, place):
        with own_errors_only(kind):
            e = objective.evaluate(params, x, t)
            assert isinstance(e.value + objective.value(params, x, t), float)
            e.gradient(), e.jvp(params), e.take(2).gradient()
            products.quadratic_forms(e, [params]), products.hessian_product(e, params)
            products.fisher_product(e, params, Empirical())
            products.block_forms(e, params, MonteCarlo(1))
        for curvature in CURVATURES:
            with own_errors_only(kind):
                e = objective.evaluate(params, x, t)
                moments = curvature.estimate(e, Exact(), Rng(0))
                for damping in (1e-30, 1e30):
                    factors, _ = curvature.factorise(moments, damping)
                    curvature.solve(factors, e.gradient())
                curvature.block_traces(moments, params)
            with own_errors_only(kind):
                quality(e, curvature, draws=1)
