"""The optimiser with the tridiagonal curvature: its first step densely, its progress, its state."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from cases import real_targets
from numerics import assert_close, flat, host
from tridiagonal_dense import factors_of

from kfac_np import trees
from kfac_np.backend import Backend, Rng, get_backend
from kfac_np.curvature import BlockDiagonal, BlockTridiagonal, FullKronecker, quality
from kfac_np.errors import ConfigError, CurvatureError
from kfac_np.fisher import Exact
from kfac_np.layers import Dense, Logistic, Residual, Sequential, Tanh
from kfac_np.losses import SigmoidCrossEntropy, SquaredError
from kfac_np.objective import Objective
from kfac_np.optimizers import KFAC, LevenbergMarquardt, practical, published
from kfac_np.testing import check_curvature
from kfac_np.training import checkpoint
from kfac_np.training.config import from_table, to_table
from kfac_np.training.experiment import Experiment

NETWORK = Sequential(Dense(8, 6), Logistic(), Dense(6, 3), Dense(3, 6), Logistic(), Dense(6, 8))
OBJECTIVE = Objective(NETWORK, SigmoidCrossEntropy())


def data(backend: Backend, n: int = 200) -> Any:
    """Images of three hidden numbers."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((n, 3)) @ rng.standard_normal((3, 8))
    return backend.asarray(1.0 / (1.0 + np.exp(-2.0 * z)))


def start(backend: Backend) -> Any:
    return NETWORK.init(Rng(0), backend)


@pytest.mark.parametrize("lambda0", [150.0, 0.5])
def test_first_update_of_the_published_algorithm(backend: Backend, lambda0: float):
    """δ = αΔ, with Δ = -F̂(γ₀)⁻¹ ∇h, and α minimising M(αΔ): all dense, in NumPy."""
    x, params = data(backend), start(backend)
    eta = 1e-5
    optimizer = published(
        OBJECTIVE,
        curvature=BlockTridiagonal(),
        fisher=Exact(),
        damping=LevenbergMarquardt(lambda0),
        l2=eta,
    )
    state, report = optimizer.step(optimizer.init(params), x, x)
    theta = flat(trees.ravel(params))
    gradient = flat(trees.ravel(OBJECTIVE.evaluate(params, x, x).gradient())) + eta * theta
    n = x.shape[0]
    statistics = OBJECTIVE.evaluate(params, x, x).take(math.ceil(n / 8))
    model = OBJECTIVE.evaluate(params, x, x).take(math.ceil(n / 4))
    F = exact_fisher(model) + (lambda0 + eta) * np.eye(len(theta))
    factors = factors_of(statistics, Exact())
    gamma = math.sqrt(lambda0 + eta)
    delta = -factors.damped(gamma**2).inverse() @ gradient
    alpha = -(gradient @ delta) / (delta @ F @ delta)
    best = 0.5 * alpha**2 * (delta @ F @ delta) + alpha * (gradient @ delta)
    assert report.gamma == pytest.approx(gamma, rel=1e-14)
    assert report.alpha == pytest.approx(alpha, rel=1e-9)
    assert report.model_decrease == pytest.approx(best, rel=1e-9)
    assert_close(flat(trees.ravel(state.params)) - theta, alpha * delta, 1e-9)
    assert report.events == ()
    plain = published(OBJECTIVE, fisher=Exact(), damping=LevenbergMarquardt(lambda0), l2=eta).step(
        optimizer.init(params), x, x
    )[0]
    assert np.max(np.abs(flat(trees.ravel(plain.params)) - flat(trees.ravel(state.params)))) > 1e-6


def exact_fisher(e: Any) -> Any:
    """(1/M) Σ JᵀSᵀSJ from statistics, without the library's curvature."""
    rows = []
    for statistics in Exact().statistics(e, Rng(0)):
        parts = [
            np.einsum("vno,ni->vnoi", host(s.stacked_g)[:, :, 0, :], host(s.a)[:, 0, :])
            for s in trees.leaves(statistics)
        ]
        k, n = parts[0].shape[:2]
        rows.append(np.concatenate([p.reshape(k * n, -1) for p in parts], axis=1))
    u = np.concatenate(rows)
    return u.T @ u / e.scale.terms


def losses(optimizer: KFAC, backend: Backend, steps: int) -> list[float]:
    x, state = data(backend), optimizer.init(start(backend))
    found = []
    for _ in range(steps):
        state, report = optimizer.step(state, x, x)
        assert not [event for event in report.events if event.rung != "more damping"]
        found.append(report.loss)
    return found


def test_a_published_run_descends():
    """Far below what an output bias alone attains.

    While progress is fast, more coupling is faster; momentum makes up for what is left out. On
    NumPy alone: that backends agree is the law of the first update.
    """
    backend = get_backend("numpy", "float64")
    curvatures = {"diagonal": BlockDiagonal(), "tri": BlockTridiagonal(), "full": FullKronecker()}
    found = {
        name: losses(
            published(OBJECTIVE, curvature=c, damping=LevenbergMarquardt(0.1)), backend, 60
        )
        for name, c in curvatures.items()
    }
    x = host(data(backend))
    entropy = float(np.mean(np.sum(-x * np.log(x) - (1 - x) * np.log(1 - x), axis=1)))
    p = x.mean(0)
    bias = float(np.sum(-p * np.log(p) - (1 - p) * np.log(1 - p)))
    for loss in found.values():
        assert loss[-1] - entropy < 0.04 * (bias - entropy)
    assert found["full"][5] < found["tri"][5] < found["diagonal"][5] - 0.1


@pytest.mark.alike("curvature")
@pytest.mark.parametrize(
    "curvature", [BlockTridiagonal(), FullKronecker()], ids=["tridiagonal", "full"]
)
def test_a_run_resumes_bit_for_bit(backend: Backend, tmp_path, curvature):
    optimizer = published(OBJECTIVE, curvature=curvature, damping=LevenbergMarquardt(1.0))
    x, state = data(backend, 64), optimizer.init(start(backend))
    for _ in range(4):
        state, _ = optimizer.step(state, x, x)
    path = tmp_path / "step.npz"
    checkpoint.save(path, optimizer.state_to_tree(state), {})
    tree, _ = checkpoint.load(path, backend)
    again = optimizer.state_from_tree(tree)
    for _ in range(20):  # past a refresh and a search for γ
        state, first = optimizer.step(state, x, x)
        again, second = optimizer.step(again, x, x)
        assert first == second
    np.testing.assert_array_equal(flat(trees.ravel(state.params)), flat(trees.ravel(again.params)))
    np.testing.assert_array_equal(
        flat(trees.ravel(state.factors)), flat(trees.ravel(again.factors))
    )


def test_kl_clip_uses_the_matrix(backend: Backend):
    """vᵀF̂v with the coupling: another step length than that of block-diagonal K-FAC."""
    optimizer = practical(OBJECTIVE, rate=0.5, curvature=BlockTridiagonal(), kl_clip=1e-4)
    x, state = data(backend, 64), optimizer.init(start(backend))
    for _ in range(3):
        state, report = optimizer.step(state, x, x)
        assert report.alpha is not None
        assert 0 < report.alpha < 0.5
    assert np.all(np.isfinite(flat(trees.ravel(state.params))))


def test_a_network_that_is_no_chain_is_refused_before_a_step(backend: Backend):
    network = Sequential(Dense(8, 4), Residual(Sequential(Tanh(), Dense(4, 4))), Dense(4, 8))
    objective = Objective(network, SigmoidCrossEntropy())
    x = data(backend, 32)
    params = network.init(Rng(0), backend)
    optimizer = KFAC(objective, curvature=BlockTridiagonal())
    with pytest.raises(CurvatureError, match="layer 1: a Residual"):
        optimizer.step(optimizer.init(params), x, x)
    optimizer = KFAC(objective, curvature=BlockTridiagonal(split=True))
    _, report = optimizer.step(optimizer.init(params), x, x)
    assert report.update_norm > 0


def test_moments_of_a_run_as_diagnostics(backend: Backend):
    optimizer = published(OBJECTIVE, curvature=BlockTridiagonal())
    x, state = data(backend), optimizer.init(start(backend))
    for _ in range(3):
        state, _ = optimizer.step(state, x, x)
    e = OBJECTIVE.evaluate(state.params, x, x)
    found = quality(e, optimizer.curvature, moments=state.moments, vectors=[e.gradient()])
    assert len(found.layers) == 4
    assert 0.1 < found.cosine <= 1


def test_by_name_in_a_configuration():
    for name, cls in (
        ("block-diagonal", BlockDiagonal),
        ("block-tridiagonal", BlockTridiagonal),
        ("full-kronecker", FullKronecker),
    ):
        config = from_table(
            {"data": "digits", "run": {"steps": 1}, "optimizer": {"curvature": name}}
        )
        assert isinstance(config.optimizer.curvature, cls)
        assert from_table(to_table(config)) == config
    table = {
        "data": {"name": "digits", "n_train": 50},
        "model": {"sizes": [6]},
        "run": {"steps": 1},
        "optimizer": {"curvature": {"name": "block-tridiagonal", "split": True}},
    }
    experiment = Experiment.of(from_table(table))
    position = experiment.start()
    x = experiment.supply.x
    state, _ = experiment.optimizer.step(position.state, x, x)
    assert "A_next" in state.moments["0"]
    table["optimizer"]["curvature"]["block"] = {"exact_damping": True}
    with pytest.raises(ConfigError, match="expected a KFACBlock with factored damping"):
        from_table(table)


def test_the_laws_of_curvatures_on_an_autoencoder():
    backend = get_backend("numpy", "float64")
    x = data(backend, 40)
    t = backend.asarray(real_targets(np.random.default_rng(1), (40, 8)))
    objective = Objective(NETWORK, SquaredError())
    check_curvature(BlockTridiagonal(), objective, start(backend), x, t)
