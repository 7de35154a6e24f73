"""Optimisers on networks that draw masks, couple examples or take integers."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kfac_np import trees
from kfac_np.backend import Array, Backend, Rng, get_backend, to_numpy
from kfac_np.curvature import BlockDiagonal, FullMatrix, KFACBlock
from kfac_np.fisher import Empirical, Exact
from kfac_np.layers import (
    BatchNorm,
    Conv,
    Dense,
    Dropout,
    Embedding,
    Flatten,
    GroupNorm,
    Layer,
    LayerNorm,
    RMSNorm,
    Sequential,
    Tanh,
)
from kfac_np.losses import SoftmaxCrossEntropy
from kfac_np.objective import Objective
from kfac_np.optimizers import (
    KFAC,
    SGD,
    Adam,
    GammaSearch,
    IterateAverage,
    LevenbergMarquardt,
    Optimizer,
    Refresh,
    State,
    practical,
)

Make = Callable[[Objective], Optimizer]
QUICK: dict[str, Any] = {
    "damping": LevenbergMarquardt(0.3, interval=2),
    "gamma": GammaSearch(interval=5),
    "refresh": Refresh(5, first=2),
    "statistics_fraction": 1 / 4,
}
OPTIMIZERS: dict[str, Make] = {
    "kfac": lambda o: KFAC(o, **QUICK),
    "kfac_exact_fisher": lambda o: KFAC(
        o, curvature=BlockDiagonal(KFACBlock(exact_damping=True)), fisher=Exact(), **QUICK
    ),
    "kfac_empirical_full": lambda o: KFAC(o, curvature=FullMatrix(), fisher=Empirical(), **QUICK),
    "practical": lambda o: practical(o, 0.1, kl_clip=1e-2),
    "sgd": lambda o: SGD(o, rate=0.1, averaging=IterateAverage()),
    "adam": lambda o: Adam(o, rate=0.02),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """A network and a batch of inputs of two classes."""

    network: Layer
    x: np.ndarray
    t: np.ndarray

    def batch(self, backend: Backend) -> tuple[Array, Array]:
        return backend.asarray(self.x), backend.asarray(self.t)

    def start(self, optimizer: Optimizer, backend: Backend) -> State:
        return optimizer.init(self.network.init(Rng(0), backend))


def _tasks() -> dict[str, Task]:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((32, 4))
    t = (x[:, 0] * x[:, 1] > 0).astype(np.int64)
    images = draw.standard_normal((32, 3, 3, 1))
    brighter = (images[:, 0].sum((1, 2)) > images[:, 2].sum((1, 2))).astype(np.int64)
    words = draw.integers(0, 6, (32, 3))
    same = (words[:, 0] % 2 == words[:, 2] % 2).astype(np.int64)
    return {
        "dropout": Task(
            Sequential(Dense(4, 12), Tanh(), Dropout(0.3), Dense(12, 8), Tanh(), Dense(8, 2)), x, t
        ),
        "dropout_first": Task(Sequential(Dropout(0.2), Dense(4, 12), Tanh(), Dense(12, 2)), x, t),
        "layer_norm": Task(
            Sequential(Dense(4, 12), LayerNorm(12), Tanh(), Dense(12, 8), RMSNorm(8), Dense(8, 2)),
            x,
            t,
        ),
        "batch_norm": Task(
            Sequential(Dense(4, 12, bias=False), BatchNorm(12), Tanh(), Dense(12, 2)), x, t
        ),
        "batch_norm_and_dropout": Task(
            Sequential(Dense(4, 12), BatchNorm(12), Tanh(), Dropout(0.3), Dense(12, 2)), x, t
        ),
        "group_norm": Task(
            Sequential(Conv(1, 4, (2, 2)), GroupNorm(2, 4), Tanh(), Flatten(), Dense(16, 2)),
            images,
            brighter,
        ),
        "embedding": Task(
            Sequential(Embedding(6, 4), Flatten(), Dense(12, 8), Tanh(), Dense(8, 2)), words, same
        ),
    }


TASKS = _tasks()
RANDOM = [name for name in TASKS if "dropout" in name]


@pytest.fixture(params=OPTIMIZERS)
def make(request: pytest.FixtureRequest) -> Make:
    return OPTIMIZERS[request.param]


def bits(optimizer: Optimizer, state: State) -> list[tuple[str, Any]]:
    """Everything in a state: arrays as bytes."""
    return [
        (path, to_numpy(leaf).tobytes() if hasattr(leaf, "shape") else leaf)
        for path, leaf in trees.items(optimizer.state_to_tree(state))
    ]


@pytest.mark.parametrize("task", TASKS)
def test_steps_are_functions_and_resume_bit_for_bit(task: str, make: Make, backend: Backend):
    """Masks belong to (seed, step): nothing of them is in the state, and nothing is lost."""
    case = TASKS[task]
    optimizer = make(Objective(case.network, SoftmaxCrossEntropy()))
    state, batch = case.start(optimizer, backend), case.batch(backend)
    for _ in range(7):
        tree = copy.deepcopy(optimizer.state_to_tree(state))
        restored = make(optimizer.objective).state_from_tree(tree)
        resumed, again = optimizer.step(restored, *batch)
        state, report = optimizer.step(state, *batch)
        assert bits(optimizer, resumed) == bits(optimizer, state)
        assert report == again
        assert all(event.factor == "update" for event in report.events)


@pytest.mark.parametrize("name", ["kfac", "practical", "sgd", "adam"])
@pytest.mark.parametrize("task", TASKS)
def test_the_loss_goes_down(task: str, name: str):
    case, backend = TASKS[task], get_backend("numpy", "float64")
    objective = Objective(case.network, SoftmaxCrossEntropy())
    optimizer, batch = OPTIMIZERS[name](objective), case.batch(backend)
    state = case.start(optimizer, backend)
    before = objective.value(state.params, *batch)
    for _ in range(60):
        state, _ = optimizer.step(state, *batch)
    assert objective.value(state.params, *batch) < 0.75 * before


@pytest.mark.parametrize("task", RANDOM)
def test_every_step_has_a_new_mask(task: str, make: Make, backend: Backend):
    """The loss that a step reports is that of the network with the step's own mask."""
    case = TASKS[task]
    objective = Objective(case.network, SoftmaxCrossEntropy())
    optimizer, batch = make(objective), case.batch(backend)
    state, losses = case.start(optimizer, backend), []
    for k in range(1, 4):
        _, report = optimizer.step(dataclasses.replace(state, step=k - 1), *batch)
        expected = objective.value(state.params, *batch, rng=Rng(0).child("forward", k))
        assert report.loss == pytest.approx(expected, rel=1e-14)
        losses.append(report.loss)
    assert len({round(loss, 9) for loss in losses}) == 3
    other = dataclasses.replace(optimizer, seed=1)
    assert other.step(state, *batch)[1].loss != pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_the_reduction_ratio_compares_like_with_like(task: str, backend: Backend):
    """ρ is a quotient of changes of one function: with the mask that the step was made with."""
    case = TASKS[task]
    objective = Objective(case.network, SoftmaxCrossEntropy())
    kfac = KFAC(objective, **{**QUICK, "damping": LevenbergMarquardt(0.3, interval=1)})
    batch, state = case.batch(backend), case.start(kfac, backend)
    for k in range(1, 7):
        new, report = kfac.step(state, *batch)
        assert report.rho is not None
        values = []
        for params in (state.params, new.params):
            value = objective.value(params, *batch, rng=Rng(0).child("forward", k))
            values.append(value + 0.5 * kfac.l2 * float(trees.squared_norm(params)))
        expected = (values[1] - values[0]) / report.model_decrease
        assert report.rho == pytest.approx(expected, rel=1e-6)
        state = new


def test_a_small_step_does_what_the_model_says():
    """Damped so much, the model's decrease is half of the slope's, the other half is damping.

    The loss decreases by all of it if gradient, model and loss have mask and statistics in common.
    """
    backend = get_backend("numpy", "float64")
    for name, case in TASKS.items():
        objective = Objective(case.network, SoftmaxCrossEntropy())
        kfac = KFAC(objective, damping=LevenbergMarquardt(1e5, interval=1), statistics_fraction=1.0)
        _, report = kfac.step(case.start(kfac, backend), *case.batch(backend))
        assert report.rho == pytest.approx(2.0, abs=4e-3), name


@pytest.mark.parametrize("name", ["kfac", "sgd"])
def test_a_diverging_mask_leaves_the_state(name: str):
    """Numbers that are not finite are errors here as everywhere, with or without a mask."""
    case, backend = TASKS["dropout"], get_backend("numpy", "float64")
    optimizer = OPTIMIZERS[name](Objective(case.network, SoftmaxCrossEntropy()))
    state = case.start(optimizer, backend)
    x, t = case.batch(backend)
    with pytest.raises(ValueError, match="x: expected finite values"):
        optimizer.step(state, math.nan * x, t)
    assert state.step == 0
