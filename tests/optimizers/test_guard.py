"""What raises the objective is not kept; λ stays in bounds; outliers pass, and lasting changes do.

The laws hold for whatever K-FAC is composed of, so that the settings are one table, and the data
are small: targets and features in the units that they come in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from dense_net import HostArray
from optimizer_cases import Case, a_guard, case, flat

from kfac_np.backend import Backend, Rng, get_backend
from kfac_np.curvature import (
    EKFAC,
    BlockDiagonal,
    BlockTridiagonal,
    Curvature,
    DiagonalBlock,
    FullMatrix,
)
from kfac_np.errors import ConfigError
from kfac_np.fisher import Exact
from kfac_np.layers import Dense, Layer, ReLU, Sequential, Tanh
from kfac_np.losses import Loss, PoissonLogRate, SoftmaxCrossEntropy, SquaredError
from kfac_np.objective import Objective
from kfac_np.optimizers import (
    KFAC,
    Balance,
    KFACState,
    LevenbergMarquardt,
    QuadraticModel,
    StepReport,
    practical,
)

NUMPY = get_backend("numpy", "float64")
EPSILON = float(np.finfo(np.float64).eps)
REJECTED, TAKEN_BACK = "update rejected", "update taken back"
KFACS: dict[str, Callable[[Objective], KFAC]] = {
    "kfac": KFAC,
    "eigenbasis": lambda o: KFAC(o, curvature=EKFAC()),
    "tridiagonal": lambda o: KFAC(o, curvature=BlockTridiagonal()),
    "exact": lambda o: KFAC(o, fisher=Exact()),
    "balanced": lambda o: KFAC(o, balance=Balance()),
    "fixed": lambda o: practical(o, 50.0, kl_clip=None),
}


@dataclass(frozen=True)
class Problem:
    """Dense layers of some sizes on data of its own."""

    sizes: tuple[int, ...]
    activation: Layer
    loss: Loss
    x: HostArray
    t: HostArray

    @property
    def objective(self) -> Objective:
        layers: list[Layer] = []
        for m, n in itertools.pairwise(self.sizes):
            layers += [Dense(m, n), self.activation]
        return Objective(Sequential(*layers[:-1]), self.loss)

    def start(self, kfac: KFAC) -> KFACState:
        return kfac.init(kfac.objective.network.init(Rng(0), NUMPY))


def natural_units() -> Problem:
    g = np.random.default_rng(0)
    x = g.standard_normal((500, 8))
    t = 100 * (5 + 2 * x[:, :1] + x[:, 1:2] ** 2)
    return Problem((8, 64, 32, 1), ReLU(), SquaredError(), x, t)


def large_counts() -> Problem:
    g = np.random.default_rng(1)
    x = g.standard_normal((200, 5))
    t = g.poisson(150 * np.exp(0.3 * x[:, :1])).astype(float)
    return Problem((5, 16, 1), Tanh(), PoissonLogRate(), x, t)


def raw_features() -> Problem:
    """Logits of hundreds: the network is sure of wrong answers, and F all but vanishes."""
    g = np.random.default_rng(2)
    x = 1e3 * g.standard_normal((150, 6))
    t = (x[:, 0] * x[:, 1] > 0).astype(np.int64)
    return Problem((6, 16, 2), ReLU(), SoftmaxCrossEntropy(), x, t)


PROBLEMS = {"natural_units": natural_units, "counts": large_counts, "saturated": raw_features}
# Where the objective of each problem ends, within so many steps; "fixed" has a rate that is absurd.
ENDS = {"natural_units": 1.3e3, "counts": -630.0, "saturated": 0.05}


def rungs(report: StepReport) -> list[str]:
    return [event.rung for event in report.events]


@pytest.mark.parametrize("name", KFACS)
@pytest.mark.parametrize("data", PROBLEMS)
def test_the_objective_never_rises(data: str, name: str) -> None:
    """On a whole batch, from one accepted step to the next, but for rounding; and it falls."""
    problem = PROBLEMS[data]()
    kfac = KFACS[name](problem.objective)
    state, accepted = problem.start(kfac), []
    for _ in range(60):
        state, report = kfac.step(state, problem.x, problem.t)
        if TAKEN_BACK not in rungs(report):
            accepted.append(report.objective)
    accepted.append(kfac.step(state, problem.x, problem.t)[1].objective)
    if TAKEN_BACK in rungs(kfac.step(state, problem.x, problem.t)[1]):
        accepted.pop()
    rise = max(b - a - 10 * EPSILON * abs(a) for a, b in itertools.pairwise(accepted))
    assert rise <= 0.0
    assert accepted[-1] < (accepted[0] - 1.0 if name == "fixed" else ENDS[data])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "curvature",
    [EKFAC(), BlockDiagonal(DiagonalBlock()), FullMatrix()],
    ids=lambda c: type(c).__name__,
)
def test_a_network_sure_of_wrong_answers_moves_on(curvature: Curvature, seed: int) -> None:
    """F̂ and with it λ are 0 but for underflow, and nothing that a step promises comes true.

    With seed 0 the proposal is so long that its quadratic form is negative by rounding.
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    units = np.asarray([13, 2.3, 2.4, 19, 100, 2.3, 2, 0.36, 1.6, 5, 0.96, 2.6, 750])
    centres = 1 + 0.15 * rng.standard_normal((3, 13))
    x = units * (centres[labels] + 0.15 * rng.standard_normal((90, 13)))
    objective = Objective(Sequential(Dense(13, 16), ReLU(), Dense(16, 3)), SoftmaxCrossEntropy())
    kfac = KFAC(objective, curvature=curvature)
    state = kfac.init(objective.network.init(Rng(seed), NUMPY))
    first = objective.value(state.params, x, labels)
    for _ in range(80):
        state, _ = kfac.step(state, x, labels)
    assert objective.value(state.params, x, labels) < 0.1 * first


def test_a_given_rate_is_held_to_a_batch_that_stays() -> None:
    """Once two evaluations have told that there is no noise, h never rises."""
    c = case("tanh_squared")
    kfac = practical(c.objective, 6.0, kl_clip=None)
    state, losses = kfac.init(c.params(NUMPY)), []
    for _ in range(25):
        state, report = kfac.step(state, *c.batch_on(NUMPY, 1))
        losses.append(report.objective)
    assert losses[-1] < losses[2]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(losses[2:]))


def trouble(**settings: Any) -> Callable[[Objective], KFAC]:
    """Far too little damping, and a guard that measures in few steps."""
    return lambda o: KFAC(
        o,
        damping=LevenbergMarquardt(1e-9, floor=0.0),
        step_rule=QuadraticModel(bounded=False, least_examples=1),
        guard=a_guard(**settings),
        statistics_fraction=1.0,
    )


@pytest.mark.parametrize("settling", [0, 50])
def test_what_is_taken_back_leaves_no_trace(settling: int, backend: Backend) -> None:
    """Parameters and average are, bit for bit, those before; λ is 4ⁿ times as large."""
    c = Case("relu_softmax", case("relu_softmax").net, batch=16)
    kfac = trouble(settling=settling, errors=0.5)(c.objective)
    states, seen = [kfac.init(c.params(backend))], set()
    for k in range(1, 31):
        state, report = kfac.step(states[-1], *c.batch_on(backend, k))
        before = {REJECTED: states[-1], TAKEN_BACK: states[-2] if k > 1 else states[-1]}
        for rung in set(rungs(report)) & {REJECTED, TAKEN_BACK}:
            assert (flat(state.params) == flat(before[rung].params)).all()
            assert float(state.damping) > 3.0 * float(states[-1].damping or 1e-9)
            assert report.update_norm == 0.0
            seen.add(rung)
        if TAKEN_BACK in rungs(report):
            assert (flat(state.average) == flat(states[-2].average)).all()
            assert (report.alpha, report.rho, report.refreshed) == (None, None, ())
            _, following = kfac.step(state, *c.batch_on(backend, k + 1))
            assert following.refreshed == ("0", "2")
        states.append(state)
    assert seen == {TAKEN_BACK, REJECTED} if settling else {TAKEN_BACK}


def test_without_a_guard_it_is_kept() -> None:
    """The laws above can fail."""
    problem = natural_units()
    kfac = KFAC(problem.objective, guard=None, damping=LevenbergMarquardt(1e-3))
    state, losses = problem.start(kfac), []
    for _ in range(5):
        state, report = kfac.step(state, problem.x, problem.t)
        losses.append(report.objective)
    assert max(losses) > 2.0 * losses[0]


# ------------------------------------------------------------------------------ λ's bounds


def line() -> tuple[Problem, HostArray]:
    g = np.random.default_rng(0)
    x, w = g.standard_normal((200, 4)), g.standard_normal((4, 1))
    return Problem((4, 1), Tanh(), SquaredError(), x, x @ w), -x @ w


def labels() -> tuple[Problem, HostArray]:
    g = np.random.default_rng(3)
    x = g.standard_normal((120, 5))
    t = (x[:, 0] + x[:, 1] > 0).astype(np.int64)
    return Problem((5, 16, 2), Tanh(), SoftmaxCrossEntropy(), x, t), 1 - t


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("data", [line, labels])
def test_fitted_data_may_change(data: Any, shuffled: bool) -> None:
    """What is left is rounding, and says nothing: λ stays where a new task is learned at once."""
    problem, exchanged = data()
    kfac = KFAC(problem.objective)
    state, dampings = problem.start(kfac), []
    for k in range(400):
        rows = slice(None)
        if shuffled:
            rows = np.random.default_rng(k).permutation(len(problem.x))
        t = problem.t if k < 350 else exchanged
        state, report = kfac.step(state, problem.x[rows], t[rows])
        dampings.append(report.damping)
        if k == 349:
            first = kfac.objective.value(state.params, problem.x, exchanged)
    assert 0.0 < min(dampings) < max(dampings) < 1e9  # its ceiling, 1e8 times an eigenvalue
    assert kfac.objective.value(state.params, problem.x, exchanged) < 1e-4 * first


# ----------------------------------------------------------------------------------- outliers


@pytest.mark.parametrize("size", [1e6, 1e10])
@pytest.mark.parametrize("activation", [Tanh(), ReLU()], ids=repr)
@pytest.mark.parametrize("batch", [64, 512])
def test_outliers_pass(batch: int, activation: Layer, size: float) -> None:
    """One pixel in each of three batches: within 40 steps the loss is what it was, and falls."""
    g = np.random.default_rng(0)
    x = g.uniform(0, 1, (512, 16))
    t = np.argmax((x - 0.5) @ g.standard_normal((16, 3)), axis=1)
    problem = Problem((16, 16, 3), activation, SoftmaxCrossEntropy(), x, t)
    kfac = KFAC(problem.objective)
    state, losses, events = problem.start(kfac), [], set()
    for k in range(73):
        rows = np.random.default_rng(k).permutation(512)[:batch]
        some = x[rows].copy()
        if 30 <= k < 33:
            some[0, 0] = size
        state, report = kfac.step(state, some, t[rows])
        events |= set(rungs(report))
        losses.append(kfac.objective.value(state.params, x, t))
    assert "moments out of proportion" in events
    assert losses[-1] < 0.7 * losses[29]


def test_a_lasting_change_is_followed() -> None:
    """All features × 1000 from step 30 on: nothing of the old average is left to rule."""
    problem, _ = line()
    kfac = KFAC(problem.objective)
    state, losses = problem.start(kfac), []
    for k in range(90):
        factor = 1e3 if k >= 30 else 1.0
        state, report = kfac.step(state, factor * problem.x, problem.t)
        losses.append(report.loss)
    assert losses[29] < 1e-9
    assert losses[30] > 1e3
    assert losses[-1] < 1e-9


# ------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guard": True}, "KFAC guard: expected a Guard or None, got True"),
        ({"relative": "no"}, "KFAC relative: expected True or False, got 'no'"),
        ({"damping": lambda: LevenbergMarquardt(floor=-1.0)}, "floor: expected a number >= 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KFAC(line()[0].objective, **{k: v() if callable(v) else v for k, v in settings.items()})
