"""Tasks one after the other, and networks merged: reference values, and linear models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numerics import assert_close, flat, host

from kfac_np import trees
from kfac_np.applications import ewc, fit_curvature, merge, merge_networks, online_laplace
from kfac_np.backend import Backend, Rng
from kfac_np.curvature import EKFAC, BlockDiagonal, Curvature, DiagonalBlock, ExactBlock, FullMatrix
from kfac_np.errors import InputError, ShapeError
from kfac_np.fisher import Empirical, Exact
from kfac_np.layers import Dense, ReLU, Sequential, Tanh
from kfac_np.losses import SoftmaxCrossEntropy, SquaredError
from kfac_np.objective import Objective
from kfac_np.optimizers import KFAC, SGD, Adam
from kfac_np.optimizers.family import GramDescent, Preconditioned
from kfac_np.optimizers.quadratic_model import LocalModel
from kfac_np.penalties import L2, Anchor, Penalty, Quadratic, Sum, penalized
from kfac_np.products import ggn_product

FOLDER = Path(__file__).parents[1] / "data" / "applications"
NUMPY = Backend.of(np.zeros(1))
LAYERS = {"tanh": Tanh, "relu": ReLU}
KINDS: dict[str, Curvature] = {
    "full": FullMatrix(),
    "diag": BlockDiagonal(DiagonalBlock()),
    "kron": BlockDiagonal(),
}


class Tasks:
    """A file: two tasks, and the parameters after each."""

    def __init__(self, name: str, backend: Backend) -> None:
        with np.load(FOLDER / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files}
        self.spec, self.backend = json.loads(str(self.arrays["spec"])), backend
        layers = [
            Dense(op["d_in"], op["d_out"]) if op["op"] == "linear" else LAYERS[op["op"]]()
            for op in self.spec["layers"]
        ]
        loss = SquaredError() if self.spec["loss"] == "mse" else SoftmaxCrossEntropy()
        self.objective = Objective(Sequential(*layers), loss)

    def params(self, name: str):
        """The file's flat order W0, b0, W1, b1, ... as parameters."""
        vector, tree = self.arrays[name], []
        for layer in self.objective.network.layers:
            if isinstance(layer, Dense):
                n = layer.d_in * layer.d_out
                w, b = vector[:n].reshape(layer.d_out, -1), vector[n : n + layer.d_out]
                tree.append(self.backend.asarray(np.concatenate([w, b[:, None]], 1)))
                vector = vector[n + layer.d_out :]
            else:
                tree.append(())
        return tuple(tree)

    def fit(self, task: int, curvature: Curvature):
        data = [self.backend.asarray(self.arrays[f"{name}{task}"]) for name in "xy"]
        fisher = Exact() if self.spec["fisher"] == "type2" else Empirical()
        return fit_curvature(self.objective, self.params(f"theta{task}"), [data], curvature, fisher)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ewc_mlp_ce_tanh", "ewc_mlp_mse_relu_emp"])
def test_elastic_weight_consolidation(name: str, kind: str, backend: Backend):
    tasks = Tasks(name, backend)
    one, two = (tasks.fit(task, KINDS[kind]) for task in (1, 2))
    strength, decay, v = tasks.spec["ewc_lambda"], tasks.spec["gamma"], tasks.params("v_theta")
    found: dict[str, Penalty] = {
        f"{kind}_one_task": ewc(one, strength=strength),
        f"{kind}_two_task": ewc(one, two, strength=strength),
        f"{kind}_online": ewc(one, two, strength=strength, online=True, decay=decay),
    }
    if kind == "kron":
        together = merge(one, two, params=two.params)
        found["kron_merged"] = ewc(together, strength=strength)
    for what, penalty in found.items():
        expected = tasks.arrays[f"{what}_penalty"]
        assert float(penalty.value(v)) == pytest.approx(float(expected), rel=1e-10), what
        tasks.arrays["expected"] = tasks.arrays[f"{what}_grad"]
        assert_close(penalty.gradient(v), tasks.params("expected"), 1e-10)


def ridge(x, t, precision, center):
    """argmin ½ ‖Xθ - t‖² + ½ (θ - c)ᵀ P (θ - c), a bias in θ."""
    phi = np.concatenate([x, np.ones((len(x), 1))], 1)
    return np.linalg.solve(phi.T @ phi + precision, phi.T @ t + precision @ center).T


def test_linear_tasks_in_sequence_are_the_joint_one():
    """Each task is minimised with the penalty of those before, the last minimum is that of all."""
    with np.load(FOLDER / "ewc_linear_sequential_joint.npz") as file:
        data, prior = dict(file), json.loads(str(file["spec"]))["ridge"]
    objective = Objective(Dense(4, 1), SquaredError())
    fits, theta = [], np.zeros((1, 5))
    for task in (0, 1):
        x, t = data[f"x_task{task}"], data[f"y_task{task}"]
        precision, center = prior * np.eye(5), theta.T
        if fits:
            penalty = online_laplace(*fits, terms=len(x), prior_precision=prior)
            product = [penalty.product(row.reshape(1, 5)) for row in np.eye(5)]
            precision = len(x) * np.concatenate(product)
        theta = ridge(x, t, precision, center)
        expected = np.concatenate([data[f"W0_task{task}"], data[f"b0_task{task}"][:, None]], 1)
        assert_close(theta, expected, 1e-10)
        fits.append(fit_curvature(objective, theta, [(x, t)], FullMatrix()))
    assert_close(theta, np.concatenate([data["joint_W0"], data["joint_b0"][:, None]], 1), 1e-10)


@pytest.mark.parametrize("kind", ["full", "exact", "kron"])
def test_linear_networks_merged_are_the_joint_one(kind: str, backend: Backend):
    """K-FAC is exact here, and a sum of Kronecker products is kept as one."""
    curvature = {**KINDS, "exact": BlockDiagonal(ExactBlock())}[kind]
    seed, objective = np.random.default_rng(3), Objective(Dense(3, 2), SquaredError())
    fits, parts = [], []
    for n in (9, 14, 30):
        x, t = seed.standard_normal((n, 3)) * seed.uniform(0.1, 2, 3), seed.standard_normal((n, 2))
        theta = ridge(x, t, np.zeros((4, 4)), np.zeros((4, 2)))
        x_b, t_b, w = (backend.asarray(a) for a in (x, t, theta))
        fits.append(fit_curvature(objective, w, [(x_b, t_b)], curvature))
        parts.append((x, t))
    x, t = (np.concatenate(a) for a in zip(*parts, strict=True))
    joint = ridge(x, t, np.zeros((4, 4)), np.zeros((4, 2)))
    assert_close(merge_networks(*fits), joint, 1e-10)
    far = merge_networks(*fits, damping=1e9)
    weights = [fit.terms / len(x) for fit in fits]
    mean = sum(w * host(fit.params) for w, fit in zip(weights, fits, strict=True))
    assert_close(far, mean, 1e-6)


@pytest.mark.parametrize("kind", ["kron", "diag", "ekfac", "full"])
def test_a_merged_network_has_the_least_sum_of_models(kind: str, backend: Backend):
    curvature = {**KINDS, "ekfac": EKFAC()}[kind]
    network, seed = Sequential(Dense(3, 4), Tanh(), Dense(4, 2)), np.random.default_rng(5)
    objective, fits = Objective(network, SquaredError()), []
    for n in (12, 20):
        params = trees.tree_map(
            lambda p: backend.asarray(seed.standard_normal(p.shape)), network.init(Rng(0), backend)
        )
        x, t = (backend.asarray(seed.standard_normal((n, d))) for d in (3, 2))
        fits.append(fit_curvature(objective, params, [(x, t)], curvature))
    merged, weights, damping = merge_networks(*fits, damping=0.5), np.asarray([12.0, 20.0]), 0.5
    matrices = [
        w * host(f.matrix.to_dense()) + damping * w / 32 * np.eye(26)
        for w, f in zip(weights, fits, strict=True)
    ]
    right = sum(m @ flat(f.params) for m, f in zip(matrices, fits, strict=True))
    assert_close(flat(merged), np.linalg.solve(sum(matrices), right), 1e-9)
    assert_close(merge_networks(fits[0], fits[0]), fits[0].params, 1e-15)


def test_a_penalty_is_consistent(backend: Backend):
    """Value, gradient and product are of one quadratic form; uncovered parameters are free."""
    network = Sequential(Dense(3, 4), Tanh(), Dense(4, 2))
    params, rng = network.init(Rng(0), backend), Rng(1)
    x, t = rng.normal((9, 3), backend), rng.normal((9, 2), backend)
    fit = fit_curvature(Objective(network, SquaredError()), params, [(x, t)], paths=["2"])
    anchored = ewc(fit, strength=3.0)
    for penalty in (anchored, L2(0.3), Sum((L2(0.3), anchored))):
        v, u = (trees.tree_map(lambda p: rng.normal(p.shape, backend), params) for _ in range(2))
        moved = trees.axpy(1.0, u, v)
        rise = float(penalty.value(moved)) - float(penalty.value(v))
        model = float(trees.inner(penalty.gradient(v), u)) + 0.5 * float(
            trees.inner(u, penalty.product(u))
        )
        assert rise == pytest.approx(model, rel=1e-10)
        free = isinstance(penalty, Quadratic)
        assert bool((host(penalty.gradient(v)[0]) == 0.0).all()) == free


# ------------------------------------------------------------------------------------ optimisers


def two_tasks(backend: Backend):
    """A small network, a penalty from a first task, and the data of a second one."""
    network, rng = Sequential(Dense(3, 4), Tanh(), Dense(4, 2)), Rng(1)
    objective, params = Objective(network, SquaredError()), network.init(Rng(0), backend)
    data = [tuple(rng.normal((12, d), backend) for d in (3, 2)) for _ in range(2)]
    fit = fit_curvature(objective, params, [data[0]])
    start = trees.tree_map(lambda p: p + 0.3 * rng.normal(p.shape, backend), params)
    return objective, start, ewc(fit, strength=5.0), data[1]


@pytest.mark.parametrize("make", [KFAC, SGD, Adam, Preconditioned, GramDescent])
def test_every_optimiser_takes_a_penalty(make, backend: Backend):
    objective, params, penalty, (x, t) = two_tasks(backend)
    # Its direction knows nothing of the penalty, and its rate is given: a small one, here.
    options = {"rate": 1e-3} if make is GramDescent else {}
    optimizer = make(objective, penalty=penalty, l2=0.01, **options)
    state = optimizer.init(params)
    values = []
    for _ in range(8):
        before = state.params
        state, report = optimizer.step(state, x, t)
        expected = penalty.value(before) + L2(0.01).value(before)
        assert report.objective - report.loss == pytest.approx(float(expected), rel=1e-10)
        values.append(report.objective)
    assert values[-1] < values[0]
    with pytest.raises(InputError, match="Quadratic: parameter 0: expected shape"):
        optimizer.init(params[2:])


@pytest.mark.parametrize("make", [SGD, Adam])
def test_the_identity_for_curvature_is_weight_decay(make, backend: Backend):
    objective, params, _, (x, t) = two_tasks(backend)
    zeros = {path: 0.0 * p for path, p in trees.items(params)}
    pulled = Quadratic((Anchor(0.3, None, zeros),))
    optimizers = [make(objective, l2=0.3), make(objective, penalty=pulled)]
    states = [optimizer.init(params) for optimizer in optimizers]
    for _ in range(3):
        states = [o.step(s, x, t)[0] for o, s in zip(optimizers, states, strict=True)]
    assert_close(states[1].params, states[0].params, 1e-12)


def test_the_quadratic_model_has_the_penalty(backend: Backend):
    """M(δ) - M(0) = ∇hᵀδ + ½ δᵀ (F + λI + ∇²R) δ, and its parts by layers."""
    objective, params, penalty, (x, t) = two_tasks(backend)
    e = objective.evaluate(params, x, t)
    total = penalized(0.1, penalty)
    assert total is not None
    gradient = total.add_gradient(params, e.gradient())
    model = LocalModel(e, gradient, Backend.of(x).asarray(0.2), penalty=total)
    delta = trees.tree_map(lambda p: Rng(5).normal(p.shape, backend), params)
    curved = trees.axpy(1.0, ggn_product(e, delta), trees.axpy(0.2, delta, total.product(delta)))
    expected = float(trees.inner(gradient, delta)) + 0.5 * float(trees.inner(delta, curved))
    assert float(model.decrease(delta)) == pytest.approx(expected, rel=1e-10)
    alone = {
        path: trees.map_named(lambda p, d, path=path: d if p == path else 0.0 * d, delta)
        for path in ("0", "2")
    }
    each = model.of_each_layer(delta, Exact(), Rng(0))
    for path, part in alone.items():
        curved = trees.axpy(1.0, ggn_product(e, part), trees.axpy(0.2, part, total.product(part)))
        assert float(each[path][0]) == pytest.approx(float(trees.inner(part, curved)), rel=1e-10)


def test_kfac_learns_linear_tasks_to_the_joint_solution():
    seed, objective = np.random.default_rng(0), Objective(Dense(3, 2), SquaredError())
    theta, fits, parts = np.zeros((2, 4)), [], []
    for n in (15, 12, 20):
        x, t = seed.standard_normal((n, 3)), seed.standard_normal((n, 2))
        penalty = online_laplace(*fits, terms=n, prior_precision=0.1) if fits else L2(0.1 / n)
        kfac = KFAC(objective, penalty=penalty)
        state = kfac.init(theta)
        for _ in range(60):
            state, _ = kfac.step(state, x, t)
        theta = state.params
        fits.append(fit_curvature(objective, theta, [(x, t)]))
        parts.append((x, t))
    x, t = (np.concatenate(a) for a in zip(*parts, strict=True))
    assert_close(theta, ridge(x, t, 0.1 * np.eye(4), np.zeros((4, 2))), 1e-6)


def test_bad_input_is_refused_by_name():
    network, other = Sequential(Dense(3, 4), Tanh(), Dense(4, 2)), Sequential(Dense(3, 2))
    x, t, objective = np.ones((5, 3)), np.ones((5, 2)), Objective(network, SquaredError())
    fit, stranger = (
        fit_curvature(Objective(net, SquaredError()), net.init(Rng(0), NUMPY), [(x, t)])
        for net in (network, other)
    )
    for call, message in [
        (lambda: ewc(strength=1.0), "ewc: expected 1 fits at least, got none"),
        (lambda: ewc(fit, strength=-1.0), "ewc strength: expected a number >= 0, got -1.0"),
        (lambda: ewc(fit, strength=1.0, decay=0.0), r"ewc decay: expected a number in \(0, 1\]"),
        (lambda: ewc(fit, stranger, strength=1.0), "ewc: fit 2: operand: expected shapes"),
        (lambda: ewc(fit.params, strength=1.0), "ewc: expected a FittedCurvature"),
        (lambda: online_laplace(fit, terms=0), "online_laplace terms: expected an integer > 0"),
        (lambda: online_laplace(fit, terms=5, prior_precision=-1.0), "prior_precision: expected"),
        (lambda: merge_networks(fit), "merge_networks: expected 2 fits at least, got 1"),
        (lambda: merge_networks(fit, stranger), "merge_networks: fit 2: operand"),
        (lambda: merge_networks(fit, fit, weights=[1.0]), r"weights: expected 2 numbers > 0"),
        (lambda: merge_networks(fit, fit, damping=-1.0), "merge_networks damping"),
        (lambda: Sum(()), "Sum: expected a tuple of penalties"),
        (lambda: SGD(objective, penalty=0.5), "SGD penalty: expected a Penalty or None, got 0.5"),
        (lambda: Quadratic((Anchor(-1.0, None, {}),)), "Quadratic strength"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(ShapeError, match=r"Quadratic: parameter 0: expected shape \(4, 4\), got"):
        ewc(fit, strength=1.0).require_params(stranger.params)
    with pytest.raises(ShapeError, match=r"Quadratic: parameter 0: expected shape \(4, 4\), got"):
        ewc(fit, strength=1.0).value(stranger.params)
