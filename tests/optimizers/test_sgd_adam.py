"""SGD and Adam against their textbook recurrences, on gradients by HIPS autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from autograd import grad
from dense_net import HostArray
from optimizer_cases import Case, case, flat

from kfac_np.backend import Backend, get_backend
from kfac_np.optimizers import SGD, Adam, Exponential, IterateAverage, Optimizer, Piecewise

STEPS = 40
NUMPY = get_backend("numpy", "float64")
Gradient = Callable[[HostArray, int], HostArray]


def heavy_ball(
    rate: Callable[[int], float], momentum: float
) -> Callable[[HostArray, Gradient], list[HostArray]]:
    """v ← μ v - α ∇h(θ); θ ← θ + v."""

    def run(theta: HostArray, gradient: Gradient) -> list[HostArray]:
        v, path = np.zeros_like(theta), []
        for k in range(1, STEPS + 1):
            v = momentum * v - rate(k) * gradient(theta, k)
            theta = theta + v
            path.append(theta)
        return path

    return run


def nesterov(rate: float, momentum: float) -> Callable[[HostArray, Gradient], list[HostArray]]:
    """Sutskever et al. 2013, eq. 3 and 4: the gradient is taken at φ + μ v, a step ahead.

    v ← μ v - α ∇h(φ + μ v); φ ← φ + v. The library keeps θ = φ + μ v, where gradients are taken.
    """

    def run(theta: HostArray, gradient: Gradient) -> list[HostArray]:
        phi, v, path = theta, np.zeros_like(theta), []
        for k in range(1, STEPS + 1):
            v = momentum * v - rate * gradient(phi + momentum * v, k)
            phi = phi + v
            path.append(phi + momentum * v)
        return path

    return run


def adam(
    rate: Callable[[int], float], b1: float = 0.9, b2: float = 0.999, epsilon: float = 1e-8
) -> Callable[[HostArray, Gradient], list[HostArray]]:
    """Kingma & Ba 2015, algorithm 1."""

    def run(theta: HostArray, gradient: Gradient) -> list[HostArray]:
        m, v, path = np.zeros_like(theta), np.zeros_like(theta), []
        for k in range(1, STEPS + 1):
            g = gradient(theta, k)
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g**2
            m_hat, v_hat = m / (1 - b1**k), v / (1 - b2**k)
            theta = theta - rate(k) * m_hat / (np.sqrt(v_hat) + epsilon)
            path.append(theta)
        return path

    return run


@dataclass(frozen=True, eq=False)
class Recurrence:
    name: str
    case: Case
    make: type[Optimizer]
    settings: dict[str, Any]
    textbook: Callable[[HostArray, Gradient], list[HostArray]]

    def __str__(self) -> str:
        return self.name


RECURRENCES = [
    Recurrence(
        "gradient_descent",
        case("tanh_squared"),
        SGD,
        {"rate": 0.1, "momentum": 0.0, "nesterov": False},
        heavy_ball(lambda k: 0.1, 0.0),
    ),
    Recurrence(
        "heavy_ball",
        case("relu_softmax"),
        SGD,
        {"rate": 0.05, "momentum": 0.8, "nesterov": False, "l2": 0.01},
        heavy_ball(lambda k: 0.05, 0.8),
    ),
    Recurrence(
        "heavy_ball_scheduled",
        case("growing_softmax"),
        SGD,
        {"rate": Piecewise((0.1, 0.01), (15,)), "nesterov": False},
        heavy_ball(lambda k: 0.1 if k <= 15 else 0.01, 0.9),
    ),
    Recurrence(
        "nesterov",
        case("weighted_sigmoid"),
        SGD,
        {"rate": 0.05, "momentum": 0.9, "l2": 1e-3},
        nesterov(0.05, 0.9),
    ),
    Recurrence(
        "adam_defaults", case("softplus_poisson"), Adam, {"rate": 0.02}, adam(lambda k: 0.02)
    ),
    Recurrence(
        "adam_scheduled",
        case("no_bias_softmax"),
        Adam,
        {
            "rate": Exponential(0.1, decay=0.5, every=10),
            "beta1": 0.8,
            "beta2": 0.95,
            "epsilon": 1e-3,
            "l2": 0.02,
        },
        adam(lambda k: 0.1 * 0.5 ** ((k - 1) / 10), 0.8, 0.95, 1e-3),
    ),
]


@pytest.mark.parametrize("recurrence", RECURRENCES, ids=str)
def test_textbook_recurrence(recurrence: Recurrence, backend: Backend) -> None:
    c, l2 = recurrence.case, recurrence.settings.get("l2", 0.0)

    def gradient(theta: HostArray, k: int) -> HostArray:
        return grad(c.net.value)(theta, *c.batch_at(k)) + l2 * theta

    path = recurrence.textbook(c.host()[0], gradient)
    optimizer = recurrence.make(c.objective, **recurrence.settings)
    state = optimizer.init(c.params(backend))
    before = c.host()[0]
    for k, theta in enumerate(path, start=1):
        state, report = optimizer.step(state, *c.batch_on(backend, k))
        assert flat(state.params) == pytest.approx(theta, rel=1e-9, abs=1e-9)
        loss = float(c.net.value(before, *c.batch_at(k)))
        assert report.loss == pytest.approx(loss)
        assert report.objective == pytest.approx(loss + 0.5 * l2 * float(before @ before))
        assert report.gradient_norm == pytest.approx(float(np.linalg.norm(gradient(before, k))))
        assert report.update_norm == pytest.approx(float(np.linalg.norm(theta - before)))
        assert (report.step, state.step, state.average) == (k, k, None)
        assert (report.damping, report.gamma, report.rho, report.model_decrease) == (None,) * 4
        before = theta


@pytest.mark.parametrize("warm_up", [False, True])
@pytest.mark.parametrize("make", [SGD, Adam])
def test_iterate_average(make: type[Optimizer], warm_up: bool, backend: Backend) -> None:
    c = case("tanh_squared")
    xi = 0.9
    optimizer = make(
        c.objective, rate=0.05, averaging=IterateAverage(xi, power=0.0 if warm_up else None)
    )
    state = optimizer.init(c.params(backend))
    path, average = [], c.host()[0]
    for k in range(1, 31):
        state, _ = optimizer.step(state, *c.batch_on(backend, k))
        path.append(flat(state.params))
        weight = min(1 - 1 / k, xi) if warm_up else xi
        average = weight * average + (1 - weight) * path[-1]
        assert flat(state.average) == pytest.approx(average)
        if warm_up and k <= 10:
            assert flat(state.average) == pytest.approx(np.mean(path, axis=0))
        if not warm_up:
            rest = 1 - xi
            whole = xi**k * c.host()[0] + sum(
                rest * xi ** (k - i) * path[i - 1] for i in range(1, k + 1)
            )
            assert flat(state.average) == pytest.approx(whole)


def test_averaging_does_not_touch_the_path() -> None:
    c = case("tanh_squared")
    ends = []
    for averaging in (None, IterateAverage(0.5)):
        sgd = SGD(c.objective, rate=0.05, averaging=averaging)
        state = sgd.init(c.params(NUMPY))
        for k in range(1, 6):
            state, _ = sgd.step(state, *c.batch_on(NUMPY, k))
        ends.append(flat(state.params))
    assert (ends[0] == ends[1]).all()


def test_nesterov_differs_from_heavy_ball_from_the_first_step() -> None:
    """θ moves by (1 + μ) α ∇h at once: it stands a look ahead of φ."""
    c = case("tanh_squared")
    start = c.params(NUMPY)
    moves = []
    for ahead in (False, True):
        sgd = SGD(c.objective, rate=0.01, momentum=0.5, nesterov=ahead)
        after, _ = sgd.step(sgd.init(start), *c.batch_on(NUMPY, 1))
        moves.append(flat(after.params) - flat(start))
    assert moves[1] == pytest.approx(1.5 * moves[0])
