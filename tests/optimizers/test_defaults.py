"""What the defaults promise: no unit is built in, and λ₀ comes from the first step's F̂."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, final

import numpy as np
import pytest
from dense_reference import typical_eigenvalue
from optimizer_cases import case, flat

from kfac_np import trees
from kfac_np.backend import Backend, get_backend, to_numpy
from kfac_np.curvature import (
    EKFAC,
    BlockDiagonal,
    BlockTridiagonal,
    Curvature,
    DiagonalBlock,
    FullKronecker,
    FullMatrix,
)
from kfac_np.errors import ConfigError
from kfac_np.fisher import Exact
from kfac_np.optimizers import (
    KFAC,
    Constant,
    ConstantDamping,
    CoupledGamma,
    FixedRate,
    IterateAverage,
    KFACState,
    LevenbergMarquardt,
    StepReport,
    StepRule,
)
from kfac_np.optimizers.damping import DampingPolicy

NUMPY = get_backend("numpy", "float64")
CURVATURES: list[Curvature] = [
    BlockDiagonal(),
    BlockDiagonal(DiagonalBlock()),
    BlockTridiagonal(),
    EKFAC(),
    FullKronecker(),
    FullMatrix(),
]


@pytest.mark.parametrize("scale", [2.0**-12, 2.0**12])
@pytest.mark.parametrize("name", ["tanh_squared", "logistic_sigmoid", "relu_softmax"])
def test_multiplying_the_loss_changes_nothing(name: str, scale: float) -> None:
    """Weights of c for all examples: c times the loss, the gradient and F; the same path."""
    c = case(name)
    kfac = KFAC(c.objective)
    plain = scaled = kfac.init(c.params(NUMPY))
    for k in range(1, 26):
        x, t, _ = c.batch_on(NUMPY, k)
        plain, one = kfac.step(plain, x, t, np.ones(len(x)))
        scaled, other = kfac.step(scaled, x, t, np.full(len(x), scale))
        assert flat(scaled.params) == pytest.approx(flat(plain.params), rel=1e-6, abs=1e-6)
        assert other.damping == pytest.approx(scale * one.damping, rel=1e-6)
        assert other.gamma == pytest.approx(math.sqrt(scale) * one.gamma, rel=1e-6)


@pytest.mark.parametrize("curvature", CURVATURES, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("spread", [1.0, (1.0, 1.0, 300.0)])
def test_first_damping_is_a_typical_eigenvalue(
    spread: Any, curvature: Curvature, backend: Backend
) -> None:
    c = dataclasses.replace(case("tanh_squared"), spread=spread)
    kfac = KFAC(c.objective, curvature=curvature, fisher=Exact())
    state, report = kfac.step(kfac.init(c.params(backend)), *c.batch_on(backend, 1))
    typical = _typical_eigenvalue(curvature, state, report.objective)
    assert report.damping == pytest.approx(typical, rel=1e-9)
    assert report.gamma == pytest.approx(0.3 * math.sqrt(report.damping))


@pytest.mark.parametrize("curvature", CURVATURES, ids=lambda c: type(c).__name__)
def test_damping_has_a_floor_that_goes_with_the_fisher(
    curvature: Curvature, backend: Backend
) -> None:
    c = case("tanh_squared")
    lm = LevenbergMarquardt(initial=1e-9, interval=2, floor=0.5)
    kfac = KFAC(c.objective, curvature=curvature, fisher=Exact(), damping=lm, guard=None)
    state, _ = kfac.step(kfac.init(c.params(backend)), *c.batch_on(backend, 1))
    assert state.damping == 1e-9
    state, report = kfac.step(state, *c.batch_on(backend, 2))
    typical = _typical_eigenvalue(curvature, state, report.objective)
    assert float(state.damping) == pytest.approx(0.5 * typical, rel=1e-9)


def _typical_eigenvalue(curvature: Curvature, state: KFACState, h: float) -> float:
    """In the layers' own units, where they have some, with ten times h for all parameters."""
    moments = curvature.in_units(state.moments, state.units)
    matrix = curvature.matrix(moments, state.params)
    sizes = [math.prod(p.shape) for p in trees.leaves(state.params)]
    least = 10 * h / sum(sizes) if state.units else 0.0
    if not matrix.block_traces():
        sizes = [sum(sizes)]
    return least + typical_eigenvalue(to_numpy(matrix.to_dense()), sizes)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("trace", [0.0, math.inf, math.nan])
def test_without_eigenvalues_damping_starts_at_one(
    trace: float, relative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or, where features have units of their own, at what is added there for the loss."""
    c = dataclasses.replace(case("tanh_squared"), spread=(1.0, 1.0, 1e3))
    traces = {"0": np.asarray(trace)}
    monkeypatch.setattr(BlockDiagonal, "block_traces", lambda *_: traces)
    kfac = KFAC(c.objective, relative=relative)
    _, report = kfac.step(kfac.init(c.params(NUMPY)), *c.batch_on(NUMPY, 1))
    assert report.damping == pytest.approx(10 * report.objective / 26 if relative else 1.0)


def test_dead_network_moves_on() -> None:
    """Inputs of zero and a gradient of the bias alone: most of F is 0."""
    c = case("tanh_squared")
    kfac = KFAC(c.objective)
    x, t, _ = c.batch_on(NUMPY, 1)
    state = kfac.init(trees.scale(0.0, c.params(NUMPY)))
    losses = []
    for _ in range(10):
        state, report = kfac.step(state, 0.0 * x, t)
        losses.append(report.loss)
    assert losses[-1] <= losses[0]
    assert np.isfinite(flat(state.params)).all()


def test_a_policy_is_asked_once_where_to_start() -> None:
    """λ is carried over from the first step, also through a checkpoint."""
    c = case("relu_softmax")
    kfac = KFAC(c.objective, guard=None)
    state, first = kfac.step(kfac.init(c.params(NUMPY)), *c.batch_on(NUMPY, 1))
    assert state.damping == first.damping
    state = kfac.state_from_tree(kfac.state_to_tree(state))
    _, second = kfac.step(state, *c.batch_on(NUMPY, 2))
    assert second.damping == first.damping
    assert ConstantDamping(0.1).start(lambda: 7.0) is None
    given = dataclasses.replace(kfac, damping=LevenbergMarquardt(0.25))
    _, report = given.step(given.init(c.params(NUMPY)), *c.batch_on(NUMPY, 1))
    assert report.damping == 0.25


def test_average_is_of_the_last_part() -> None:
    """Of θ_k = k it lags by k/(p + 2); with p = 0 by half of k; never more than 1/(1 - ξ)."""
    for power, lag in ((0.0, 1 / 2), (9.0, 1 / 11), (19.0, 1 / 21)):
        average = IterateAverage(0.999, power)
        mean = (np.zeros(1),)
        for k in range(1, 201):
            mean = average.update(mean, (np.full(1, float(k)),), k)
            assert k - mean[0][0] == pytest.approx(lag * (k - 1), abs=1e-9)


def test_average_forgets_the_start() -> None:
    average = IterateAverage(0.99, power=9.0)
    assert average.update((np.full(1, 5.0),), (np.ones(1),), 1)[0][0] == 1.0


def test_fractions_beyond_one_are_refused_when_they_come() -> None:
    c = case("tanh_squared")
    kfac = KFAC(c.objective, statistics_fraction=Constant(2.0))
    with pytest.raises(ConfigError, match=r"statistics_fraction in step 1: expected .* \(0, 1\]"):
        kfac.step(kfac.init(c.params(NUMPY)), *c.batch_on(NUMPY, 1))


@final
@dataclasses.dataclass(frozen=True)
class Given(DampingPolicy):
    """λ of a step, and of the next, whatever they are."""

    now: Any = 0.1
    then: Any = 0.1

    def at(self, k: int, current: Any) -> Any:
        return self.now

    def measures(self, k: int) -> bool:
        return True

    def update(self, current: Any, rho: Any, eigenvalue: Any, *, noisy: bool = True) -> Any:
        return self.then


@pytest.mark.parametrize("wrong", [None, -1.0, math.nan, math.inf, "abc", True, np.ones(1)])
@pytest.mark.parametrize("method", ["at", "update"])
def test_a_policy_has_to_give_a_number(method: str, wrong: Any) -> None:
    c = case("tanh_squared")
    policy = Given(now=wrong) if method == "at" else Given(then=wrong)
    kfac = KFAC(c.objective, damping=policy)
    message = rf"KFAC damping: λ from Given\.{method} in step 1: expected a number >= 0, got "
    with pytest.raises(ConfigError, match=message):
        kfac.step(kfac.init(c.params(NUMPY)), *c.batch_on(NUMPY, 1))


@pytest.mark.parametrize("least", [0, -5, 2.5, math.nan, "abc", None])
@pytest.mark.parametrize("name", ["least_examples", "interval"])
def test_a_rule_has_to_say_how_many_examples_and_steps(name: str, least: Any) -> None:
    @final
    class Rule(StepRule):
        compares = False
        fraction = 1.0
        choose = FixedRate.choose

    setattr(Rule, name, least)
    with pytest.raises(ConfigError, match=rf"KFAC step_rule\.{name}: expected an integer"):
        KFAC(case("tanh_squared").objective, step_rule=Rule(), gamma=CoupledGamma())


def test_reports_are_json_whatever_the_numbers() -> None:
    """A ratio that says nothing is none."""
    numbers = {"loss": 0.5, "objective": 0.5, "model_decrease": math.inf, "rho": -math.inf}
    report = StepReport(1, 8, numbers)
    assert (report.model_decrease, report.rho) == (math.inf, None)
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["model_decrease"] is None
