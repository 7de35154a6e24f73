"""EKFAC over many batches: averages and bases, and states that go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numerics import assert_close, flat, host

from kfac_np import trees
from kfac_np.backend import Backend, Rng, get_backend
from kfac_np.curvature import (
    EKFAC,
    BlockDiagonal,
    DiagonalBlock,
)
from kfac_np.errors import ConfigError
from kfac_np.fisher import Empirical, MonteCarlo
from kfac_np.layers import Conv, Dense, Flatten, LayerNorm, Logistic, Sequential, Tanh
from kfac_np.losses import SigmoidCrossEntropy, SquaredError
from kfac_np.objective import Objective
from kfac_np.optimizers import LevenbergMarquardt, MovingAverage, published
from kfac_np.training import checkpoint
from kfac_np.training.config import from_table, to_table

HostArray = np.ndarray[Any, Any]

# ------------------------------------------------------------- averages, against NumPy by itself

SHAPES = {"0": (4, 4), "2": (2, 5)}
BATCHES = 9


def batch(k: int) -> tuple[HostArray, HostArray]:
    rng = np.random.default_rng(k)
    return rng.standard_normal((6, 3)), rng.standard_normal((6, 2))


def weights(k: int) -> dict[str, HostArray]:
    """Other parameters at every batch, as in training."""
    rng = np.random.default_rng(100 + k)
    return {path: 0.7 * rng.standard_normal(shape) for path, shape in SHAPES.items()}


def by_hand(k: int) -> dict[str, tuple[HostArray, HostArray]]:
    """ā and g of two dense layers with tanh between them, for the empirical Fisher."""
    (x, t), w = batch(k), weights(k)
    ones = np.ones((len(x), 1))
    a0 = np.hstack([x, ones])
    h = np.tanh(a0 @ w["0"].T)
    a2 = np.hstack([h, ones])
    g2 = a2 @ w["2"].T - t
    g0 = (g2 @ w["2"][:, :-1]) * (1 - h**2)
    return {"0": (a0, g0), "2": (a2, g2)}


@dataclass
class Averages:
    """Moving averages in NumPy, with the basis kept for a number of batches."""

    interval: int
    decay: float

    def run(self, batches: int) -> dict[str, dict[str, HostArray]]:
        state: dict[str, dict[str, Any]] = {}
        for k in range(1, batches + 1):
            for path, (a, g) in by_hand(k).items():
                n, old = len(a), state.get(path)
                A, G = a.T @ a / n, g.T @ g / n
                if old is None:
                    source, used = (A, G), 1
                elif old["used"] == self.interval:
                    source, used = (old["A"], old["G"]), 1
                else:
                    source, used = None, old["used"] + 1
                if source is not None:
                    U_A, U_G = (np.linalg.eigh(m)[1] for m in source)
                else:
                    U_A, U_G = old["U_A"], old["U_G"]
                S = np.zeros((g.shape[1], a.shape[1]))
                for i in range(n):
                    S += (U_G.T @ np.outer(g[i], a[i]) @ U_A) ** 2 / n
                if old is not None:
                    e = min(1 - 1 / k, self.decay)
                    A, G = e * old["A"] + (1 - e) * A, e * old["G"] + (1 - e) * G
                    e = min(1 - 1 / used, self.decay)
                    S = e * (old["S"] if used > 1 else 0) + (1 - e) * S
                state[path] = {"A": A, "G": G, "U_A": U_A, "U_G": U_G, "S": S, "used": used}
        return state


@pytest.mark.parametrize("decay", [0.95, 0.6])
@pytest.mark.parametrize("interval", [1, 3, 4, 100])
def test_moving_averages(backend: Backend, interval: int, decay: float):
    """A and G go on for ever; U is kept, then made of them; S is a mean within a basis."""
    curvature, average = EKFAC(basis_interval=interval), MovingAverage(decay)
    objective = Objective(Sequential(Dense(3, 4), Tanh(), Dense(4, 2)), SquaredError())
    moments: Any = None
    for k in range(1, BATCHES + 1):
        w = {path: backend.asarray(x) for path, x in weights(k).items()}
        x, t = (backend.asarray(z) for z in batch(k))
        e = objective.evaluate((w["0"], (), w["2"]), x, t)
        new = curvature.estimate(e, Empirical(), Rng(0), moments)
        moments = new if moments is None else curvature.mix(moments, new, average.epsilon(k))
        expected = Averages(interval, decay).run(k)
        matrix = curvature.matrix(moments, e.params)
        for path, m in moments.items():
            other = expected[path]
            assert float(m["age"]) == other["used"] - 1
            for name in ("A", "G", "S"):
                assert_close(m[name], other[name])
            u = np.kron(other["U_G"], other["U_A"])
            found = host(matrix.blocks[int(path)].to_dense())
            assert_close(found, (u * other["S"].ravel()) @ u.T)


def test_the_optimiser_hands_moments_on(backend: Backend):
    """Estimates are given the averages so far, statistics are those of τ₁ of the mini-batch."""
    curvature = EKFAC(basis_interval=3)
    optimizer = published(OBJECTIVE, curvature=curvature, damping=LevenbergMarquardt(1.0), seed=7)
    x, state = data(backend, 64), optimizer.init(start(backend))
    moments: Any = None
    for k in range(1, 8):
        e = OBJECTIVE.evaluate(state.params, x, x).take(8)
        new = curvature.estimate(e, MonteCarlo(1), Rng(7).child("targets", k), moments)
        moments = new if k == 1 else curvature.mix(moments, new, min(1 - 1 / k, 0.95))
        state, report = optimizer.step(state, x, x)
        assert not report.events
        np.testing.assert_array_equal(flat(state.moments), flat(moments))
    assert float(moments["0"]["age"]) == 0.0


def test_other_curvatures_average_everything():
    moments = {"0": {"A": np.asarray([[1.0]]), "G": np.asarray([[4.0]])}}
    mixed = BlockDiagonal().mix(moments, trees.scale(3.0, moments), 0.75)
    assert mixed == {"0": {"A": np.asarray([[1.5]]), "G": np.asarray([[6.0]])}}


# --------------------------------------------------------------------------------------- training

NETWORK = Sequential(Dense(8, 6), Logistic(), Dense(6, 3), Dense(3, 6), Logistic(), Dense(6, 8))
OBJECTIVE = Objective(NETWORK, SigmoidCrossEntropy())


def data(backend: Backend, n: int = 200) -> Any:
    """Images of three hidden numbers."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((n, 3)) @ rng.standard_normal((3, 8))
    return backend.asarray(1.0 / (1.0 + np.exp(-2.0 * z)))


def start(backend: Backend) -> Any:
    return NETWORK.init(Rng(0), backend)


def test_a_published_run_descends():
    """Far below what an output bias alone attains; on NumPy alone."""
    backend = get_backend("numpy", "float64")
    x = data(backend)
    optimizer = published(OBJECTIVE, curvature=EKFAC(), damping=LevenbergMarquardt(0.1))
    state = optimizer.init(start(backend))
    for _ in range(60):
        state, report = optimizer.step(state, x, x)
        assert not report.events
    y = host(x)
    entropy = float(np.mean(np.sum(-y * np.log(y) - (1 - y) * np.log(1 - y), axis=1)))
    p = y.mean(0)
    bias = float(np.sum(-p * np.log(p) - (1 - p) * np.log(1 - p)))
    assert report.loss - entropy < 0.04 * (bias - entropy)


@pytest.mark.alike("steps")
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_a_run_resumes_bit_for_bit(backend: Backend, tmp_path, steps: int):
    """After the first basis, within an interval of five, and within the second."""
    optimizer = published(
        OBJECTIVE, curvature=EKFAC(basis_interval=5), damping=LevenbergMarquardt(1.0)
    )
    x, state = data(backend, 64), optimizer.init(start(backend))
    for _ in range(steps):
        state, _ = optimizer.step(state, x, x)
    path = tmp_path / "step.npz"
    checkpoint.save(path, optimizer.state_to_tree(state), {})
    tree, _ = checkpoint.load(path, backend)
    again = optimizer.state_from_tree(tree)
    assert again.moments["0"]["age"].shape == ()
    for _ in range(12):  # past two bases and a refresh
        state, first = optimizer.step(state, x, x)
        again, second = optimizer.step(again, x, x)
        assert first == second
    for name in ("params", "moments", "factors"):
        ours, theirs = (flat(getattr(s, name)) for s in (state, again))
        np.testing.assert_array_equal(ours, theirs)


def test_convolutions_normalisation_and_groups_are_trained(backend: Backend):
    net = Sequential(
        Conv(2, 4, (3,), groups=2, padding=1), LayerNorm(4), Tanh(), Flatten(), Dense(24, 2)
    )
    rng = np.random.default_rng(0)
    x = backend.asarray(rng.standard_normal((32, 6, 2)))
    t = backend.asarray(rng.standard_normal((32, 2)))
    optimizer = published(
        Objective(net, SquaredError()),
        curvature=EKFAC(basis_interval=4),
        damping=LevenbergMarquardt(1.0),
        statistics_fraction=1.0,
    )
    state, losses = optimizer.init(net.init(Rng(0), backend)), []
    for _ in range(15):
        state, report = optimizer.step(state, x, t)
        losses.append(report.loss)
    assert losses[-1] < 0.2 * losses[0]
    assert state.moments["0"]["S"].shape == (2, 2, 4)
    assert "units" in state.moments["1"]


def test_by_name_in_a_configuration():
    table = {"data": "digits", "run": {"steps": 1}, "optimizer": {"curvature": "ekfac"}}
    assert from_table(table).optimizer.curvature == EKFAC()
    table["optimizer"] = {
        "curvature": {"name": "ekfac", "basis_interval": 5, "elementwise": "diagonal"}
    }
    config = from_table(table)
    assert config.optimizer.curvature == EKFAC(elementwise=DiagonalBlock(), basis_interval=5)
    assert from_table(to_table(config)) == config
    table["optimizer"]["curvature"]["basis_interval"] = 0
    with pytest.raises(ConfigError, match="basis_interval: expected an integer > 0, got 0"):
        from_table(table)
