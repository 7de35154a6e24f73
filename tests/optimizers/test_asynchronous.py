"""On an asynchronous device, steps do not wait, and do the same.

Errors that depend on computed numbers come a step later, and the state that was returned
meanwhile holds the last good parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from cases import NETWORKS
from numerics import assert_close, host
from test_optimizer_laws import CASE, OPTIMIZERS, run
from waiting import asynchronous, no_sync

from kfac_np import trees
from kfac_np.backend import Backend, Later, Rng, get_backend
from kfac_np.errors import DivergenceError, InputError, TargetError
from kfac_np.layers import Dense, Sequential, Tanh
from kfac_np.losses import (
    Loss,
    PoissonLogRate,
    SigmoidCrossEntropy,
    SoftmaxCrossEntropy,
    SquaredError,
)
from kfac_np.objective import Objective
from kfac_np.optimizers import KFAC, SGD, Adam, Optimizer, State, practical, published

# A GPU does not warn.
pytestmark = pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
NUMPY = get_backend("numpy", "float64")
# EKFAC looks at its basis' age; a block-tridiagonal chain is checked when it is estimated.
# After an update was taken back factors are renewed.
WAITING = ("kfac_eigenbasis", "kfac_tridiagonal", "kfac_in_trouble")


@pytest.fixture
def ahead(strict: Backend) -> Iterator[Backend]:
    with asynchronous():
        yield strict


@pytest.fixture(scope="module")
def strict() -> Backend:
    import array_api_strict

    return get_backend("array_api_strict", "float64", array_api_strict.Device("device1"))


def factorises(optimizer: Optimizer, state: Any, k: int) -> bool:
    if not isinstance(optimizer, KFAC):
        return False
    due = state.factors is None or optimizer.refresh.due(k) or optimizer.gamma.searches(k)
    return due or bool(state.rejected)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in WAITING])
def test_steps_do_not_wait_unless_they_factorise(name: str, ahead: Backend) -> None:
    optimizer = OPTIMIZERS[name](CASE.objective)
    state = optimizer.init(CASE.params(ahead))
    free = 0
    for k in range(1, 13):
        batch = CASE.batch_on(ahead, k)
        waits = factorises(optimizer, state, k)
        with nullcontext() if waits else no_sync(late_reads=True):
            state, _ = optimizer.step(state, *batch)
        free += not waits
    assert free >= 3


def test_steps_read_the_checks_of_the_step_before(
    ahead: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One transfer a step is waited for, and it was sent a step ago."""
    read: list[Later] = []
    numpy = Later.numpy

    def count(self: Later) -> np.ndarray:
        read.append(self)
        return numpy(self)

    monkeypatch.setattr(Later, "numpy", count)
    optimizer = SGD(CASE.objective, rate=0.05)
    state = optimizer.init(CASE.params(ahead))
    for k in range(1, 6):
        before = state
        state, _ = optimizer.step(before, *CASE.batch_on(ahead, k))
        assert len(read) == k - 1
    state.wait()
    assert len(read) == 5


@pytest.mark.parametrize("name", ["kfac", "kfac_eigenbasis", "sgd", "adam"])
def test_a_network_of_one_array(name: str, ahead: Backend) -> None:
    """Which an asynchronous device would have to be asked whether it is true."""
    optimizer = OPTIMIZERS[name](Objective(Dense(3, 2), SquaredError()))
    states = [optimizer.init(host(Rng(1).normal((2, 4), NUMPY)))]
    states += [optimizer.init(ahead.asarray(states[0].params))]
    x, t = host(Rng(2).normal((16, 3), NUMPY)), host(Rng(3).normal((16, 2), NUMPY))
    for _ in range(3):
        states[0], _ = optimizer.step(states[0], x, t)
        states[1], _ = optimizer.step(states[1], ahead.asarray(x), ahead.asarray(t))
    assert_close(states[1].params, host(states[0].params))


@pytest.mark.parametrize(
    ("name", "weighted"), [(name, i % 2 == 0) for i, name in enumerate(OPTIMIZERS)]
)
def test_the_same_steps(name: str, weighted: bool, ahead: Backend) -> None:
    c = dataclasses.replace(CASE, weighted=weighted)
    states, reports = run(OPTIMIZERS[name](c.objective), c, ahead, 12)
    expected, numbers = run(OPTIMIZERS[name](c.objective), c, NUMPY, 12)
    for state, other in zip(states, expected, strict=True):
        assert_close(trees.ravel(state.params), host(trees.ravel(other.params)))
    for report, other in zip(reports, numbers, strict=True):
        found, wanted = report.as_dict(), other.as_dict()
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            if isinstance(value, float) and not isinstance(value, bool):
                assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key
            else:
                assert found[key] == value, key


LOSSES: list[tuple[Loss, Any, type[Exception], str]] = [
    (SigmoidCrossEntropy(), 2.0, TargetError, r"expected values in \[0, 1\], got \[2, 2\]"),
    (PoissonLogRate(), -1.0, TargetError, "expected values >= 0, got -1"),
    (SigmoidCrossEntropy(), math.nan, InputError, "targets: expected finite values, got 8 of 8"),
    (SoftmaxCrossEntropy(), 0.25, TargetError, "expected distributions"),
    (SoftmaxCrossEntropy(), 2, TargetError, r"expected class numbers 0\.\.1, got 2\.\.2"),
]


def small(loss: Loss) -> Objective:
    return Objective(Sequential(Dense(3, 3), Tanh(), Dense(3, 2)), loss)


def steps(objective: Objective) -> list[Optimizer]:
    given = practical(objective, guard=None)
    return [SGD(objective, rate=0.1), Adam(objective), published(objective), given]


@pytest.mark.parametrize(("loss", "value", "kind", "message"), LOSSES, ids=str)
@pytest.mark.parametrize("which", range(4))
def test_bad_targets(
    which: int, loss: Loss, value: Any, kind: type[Exception], message: str, ahead: Backend
) -> None:
    optimizer = steps(small(loss))[which]
    x = Rng(0).normal((4, 3), ahead)
    if isinstance(value, int):
        good, bad = (ahead.asarray(np.full(4, v)) for v in (1, value))
    else:
        right = 0.5
        good, bad = (ahead.asarray(np.full((4, 2), v)) for v in (right, value))
    state = optimizer.init(optimizer.objective.network.init(Rng(1), ahead))
    for _ in range(4):  # past those that factorise in any case
        state, _ = optimizer.step(state, x, good)
    state.wait()
    with pytest.raises(kind, match=message):
        optimizer.objective.evaluate(state.params, x, bad)
    after, _ = optimizer.step(state, x, bad)
    assert_close(trees.ravel(after.params), host(trees.ravel(state.params)), 0.0)
    for late in (
        lambda: optimizer.step(after, x, good),
        after.wait,
        lambda: optimizer.state_to_tree(after),
    ):
        with pytest.raises(kind, match=message):
            late()
    optimizer.step(state, x, good)[0].wait()  # from the good one it goes on


@pytest.mark.parametrize("which", range(4))
def test_bad_inputs_and_weights(which: int, ahead: Backend) -> None:
    optimizer = steps(small(SigmoidCrossEntropy()))[which]
    x, t = Rng(0).normal((4, 3), ahead), ahead.asarray(np.full((4, 2), 0.5))
    state = optimizer.init(optimizer.objective.network.init(Rng(1), ahead))
    for _ in range(4):
        state, _ = optimizer.step(state, x, t)
    state.wait()
    weights = ahead.asarray([1.0, 1.0, 1.0, -1.0])
    for arguments, message in (
        ((math.nan * x, t), "x: expected finite values, got 12 of 12"),
        ((x, t, weights), "weights: expected values >= 0, not all 0"),
    ):
        after, _ = optimizer.step(state, *arguments)
        assert_close(trees.ravel(after.params), host(trees.ravel(state.params)), 0.0)
        with pytest.raises(InputError, match=message):
            after.wait()


def test_what_diverges(ahead: Backend) -> None:
    objective = small(SigmoidCrossEntropy())
    x, t = Rng(0).normal((4, 3), ahead), ahead.asarray(np.full((4, 2), 0.5))
    params = objective.network.init(Rng(1), ahead)
    optimizer = SGD(objective, rate=1e200)
    state: State = optimizer.init(params)
    after, report = optimizer.step(state, x, t)
    assert report.update_norm == math.inf
    assert_close(trees.ravel(after.params), host(trees.ravel(params)), 0.0)
    with pytest.raises(DivergenceError, match="step 1: the update's norm is inf; the parameters"):
        after.wait()


def test_steps_that_factorise_raise_at_once(ahead: Backend) -> None:
    objective = small(SigmoidCrossEntropy())
    optimizer = published(objective)
    state = optimizer.init(objective.network.init(Rng(1), ahead))
    x, t = Rng(0).normal((4, 3), ahead), ahead.asarray(np.full((4, 2), 2.0))
    with pytest.raises(TargetError, match="expected values in"):
        optimizer.step(state, x, t)


@pytest.mark.parametrize(
    "network", [c for c in NETWORKS if c.name in ("tanh_squared", "relu_softmax")], ids=str
)
def test_evaluating_settles(network: Any, ahead: Backend) -> None:
    problem = network.build(ahead)
    assert isinstance(problem.evaluate().value, float)
    with pytest.raises(InputError, match="x: expected finite values"):
        problem.objective.evaluate(problem.params, math.nan * problem.x, problem.t)
