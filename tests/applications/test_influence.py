"""Influence functions: scores against dense matrices, other software, and training again.

The files in tests/data/applications are numbers of kronfluence 1.0.1 on PyTorch 2.13.0 (float64)
and of refits by scikit-learn 1.9.1 (`influence_linear_loo`); what kronfluence does not have
("exact") is a dense evaluation of the formula.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cases import NETWORKS, NetworkCase
from numerics import assert_close, host
from reference_files import APPLICATIONS, Reference, load, names

from kfac_np import trees
from kfac_np.applications import (
    FittedCurvature,
    Influence,
    MeanEigenvalue,
    extremes,
    fit_curvature,
    leave_one_out,
    linear_datamodelling_score,
    random_halves,
)
from kfac_np.applications.influence_products import Factored
from kfac_np.backend import Backend, Rng, get_backend
from kfac_np.curvature import (
    EKFAC,
    BlockDiagonal,
    BlockTridiagonal,
    Curvature,
    DiagonalBlock,
    ExactBlock,
    FullMatrix,
)
from kfac_np.errors import CurvatureError, FactorizationError, InputError, ShapeError
from kfac_np.fisher import Empirical, Exact, FisherType
from kfac_np.layers import BatchNorm, Dense, Sequential, Tanh
from kfac_np.losses import SoftmaxCrossEntropy, SquaredError
from kfac_np.objective import Objective
from kfac_np.statistics import AffineStatistics

CASES = {c.name: c for c in NETWORKS}
KINDS: dict[str, Curvature] = {
    "kfac": BlockDiagonal(),
    "ekfac": EKFAC(),
    "diagonal": BlockDiagonal(DiagonalBlock()),
    "blocks": BlockDiagonal(ExactBlock()),
    "full": FullMatrix(),
    "tridiagonal": BlockTridiagonal(split=True),
}
PAGE = Path(__file__).parents[2] / "docs" / "influence.md"
NUMPY = get_backend("numpy", "float64")
NAMES = [
    "relu_softmax",
    "conv_softmax",  # weighted
    "conv1d_depthwise_squared",
    "embedding_positions",
    "attention_averaged",
    "positions_mixed_softmax",  # weighted, a loss at each position
]
CASES_AND_KINDS = [
    *((name, kind) for name in NAMES for kind in KINDS if kind != "tridiagonal"),
    ("relu_softmax", "tridiagonal"),  # of chains of dense layers
]


def batch_of(case: NetworkCase, backend: Backend):
    p = case.build(backend)
    return (p.x, p.t) if p.weights is None else (p.x, p.t, p.weights)


def fitted(case: NetworkCase, backend: Backend, kind: str, **options) -> FittedCurvature:
    p = case.build(backend)
    return fit_curvature(p.objective, p.params, [batch_of(case, backend)], KINDS[kind], **options)


def influence_of(case: NetworkCase, backend: Backend, kind: str, **options) -> Influence:
    return Influence(case.build(backend).objective, fitted(case, backend, kind), **options)


def gradients(case: NetworkCase, backend: Backend):
    """Gradients of the examples' losses as rows."""
    e = case.build(backend).evaluate()
    each = [host(s.per_example()) for s in trees.leaves(e.backward(e.output_gradient()))]
    return np.concatenate([u.reshape(len(u), -1) for u in each], axis=1)


def dense(influence: Influence):
    """B."""
    operand = influence.fit.operand
    shift = [np.full(host(p).size, influence.dampings[path]) for path, p in operand.items()]
    return host(influence.fit.matrix.to_dense()) + np.diag(np.concatenate(shift))


# ------------------------------------------------------------------------ laws, on many networks


@pytest.mark.parametrize(("name", "kind"), CASES_AND_KINDS)
def test_scores_are_those_of_dense_matrices(name: str, kind: str, backend: Backend):
    """And those of the losses at all positions add up."""
    case = CASES[name]
    batch, g = batch_of(case, backend), gradients(case, backend)
    influence = influence_of(case, backend, kind, damping=0.01)
    expected = g @ np.linalg.solve(dense(influence), g.T)
    assert_close(influence.scores(tuple(a[:2, ...] for a in batch), batch), expected[:2])
    assert_close(influence.self_influence(batch), np.diag(expected))
    each = host(influence.scores(batch, batch, query_terms=True, terms=True))
    positions = case.terms // case.shape[0]
    assert each.shape == (case.shape[0], positions, case.shape[0], positions)
    assert_close(each.sum(axis=(1, 3)), expected)
    each_self = np.einsum("nini->ni", each)
    assert_close(influence.self_influence(batch, terms=True), each_self)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("relu_softmax", "ekfac"), ("conv_softmax", "kfac"), ("positions_mixed_softmax", "full")],
)
def test_examples_are_taken_as_the_budget_allows(name: str, kind: str, backend: Backend):
    case = CASES[name]
    batch = batch_of(case, backend)
    found = []
    for budget in (1, 30_000, 2**28):
        influence = influence_of(case, backend, kind, budget_bytes=budget)
        each = influence.scores(batch, batch, terms=True)
        found.append((each, influence.self_influence(batch)))
    for one, other in itertools.pairwise(found):
        assert_close(one[0], other[0])
        assert_close(one[1], other[1])


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "full"])
def test_damping_is_added_to_the_matrix_layer_by_layer(kind: str, backend: Backend):
    case = CASES["relu_softmax"]
    batch, fit = batch_of(case, backend), fitted(case, backend, kind)
    means = {p: float(host(d).mean()) for p, d in fit.matrix.diagonal().items()}
    g = gradients(case, backend)
    for damping, expected in [
        (MeanEigenvalue(), {path: 0.1 * mean for path, mean in means.items()}),
        (MeanEigenvalue(2.0), {path: 2.0 * mean for path, mean in means.items()}),
        ({"0": 0.1, "2": 0.2, "4": 0.3}, {"0": 0.1, "2": 0.2, "4": 0.3}),
        (1, dict.fromkeys(means, 1.0)),
    ]:
        influence = Influence(case.build(backend).objective, fit, damping)
        assert influence.dampings == pytest.approx(expected, rel=1e-12)
        assert_close(influence.scores(batch, batch), g @ np.linalg.solve(dense(influence), g.T))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_dense_layers_form_no_derivative(
    dtype: str, backend: Backend, monkeypatch: pytest.MonkeyPatch
):
    """And of K-FAC 1 / (λ^G_i λ^A_j + λ) is a sum of few products."""
    xp = backend.xp
    number = xp.float64 if dtype == "float64" else xp.float32
    objective = Objective(Sequential(Dense(150, 130), Tanh(), Dense(130, 3)), SoftmaxCrossEntropy())
    params, x = (
        trees.tree_map(lambda a: xp.astype(a, number), tree)
        for tree in (objective.network.init(Rng(0), backend), Rng(1).normal((40, 150), backend))
    )
    batch = (x, xp.argmax(x[:, :3], axis=1))
    influence = Influence(objective, fit_curvature(objective, params, [batch]))

    def refuse(*_: object) -> None:
        raise AssertionError("a derivative of an example was formed")

    monkeypatch.setattr(AffineStatistics, "per_example", refuse)
    scores, own = influence.scores(batch, batch), influence.self_influence(batch)
    first = influence.pairs.products[0]
    assert isinstance(first, Factored)
    assert first.sum_of_products(number) is not None
    for p in influence.pairs.products:
        object.__setattr__(p, "damping", None)  # weights of any kind, as EKFAC's
    expected = host(influence.scores(batch, batch))
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    assert_close(scores, expected, tolerance)
    assert_close(own, np.diag(expected), tolerance)


def test_parameters_without_curvature_are_held_fixed(backend: Backend):
    case = CASES["relu_softmax"]
    objective, batch = case.build(backend).objective, batch_of(case, backend)
    fit = fitted(case, backend, "full", paths=["4"])
    last = Influence(objective, fit, 0.1)
    g = gradients(case, backend)[:, -len(dense(last)) :]
    assert_close(last.scores(batch, batch), g @ np.linalg.solve(dense(last), g.T))


def test_weights_of_zero_are_scores_of_zero():
    """Also where all examples that are taken at a time have none."""
    case = CASES["relu_softmax"]
    x, t = batch_of(case, NUMPY)
    influence = influence_of(case, NUMPY, "kfac", budget_bytes=1)
    plain = influence.scores((x, t), (x, t))
    w = np.asarray([0.0, 2.0, 1.0, 1.0, 0.0, 1.0])
    assert_close(influence.scores((x, t), (x, t, w)), plain * w)
    assert_close(influence.scores((x, t, w), (x, t)), plain * w[:, None])


# ------------------------------------------------------------------------------- other software

FILES = names("influence_mlp", "influence_cnn", folder=APPLICATIONS)


def reference_fit(
    file: Reference, backend: Backend, curvature: Curvature, fisher: FisherType, targets: str
) -> FittedCurvature:
    e = file.evaluate(backend, targets)
    return fit_curvature(file.objective, e.params, [(e.inputs, e.targets)], curvature, fisher)


def both_batches(file: Reference, backend: Backend):
    """Queries and examples."""
    return [
        (backend.asarray(file.channels_last(f"x{end}")), backend.asarray(file[f"y{end}"]))
        for end in ("_test", "")
    ]


def test_files_are_there():
    assert len(FILES) == 3


@pytest.mark.parametrize("targets", ["y", "y_sampled"])
@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("name", FILES)
def test_reference_scores(name: str, kind: str, targets: str, backend: Backend):
    """Kronfluence; its K-FAC divides G of a convolution by the number of locations, 9 here."""
    file = load(name, APPLICATIONS)
    fit = reference_fit(file, backend, KINDS[kind], Empirical(), targets)
    queries, examples = both_batches(file, backend)
    own = {"conv2d": 9.0} if kind == "kfac" else {}
    factors = {
        str(position): own.get(file.spec["layers"][position]["op"], 1.0)
        for position in file.positions
    }
    key = f"{kind}_{'emp' if targets == 'y' else 'mc'}"
    for i, damping in enumerate(file.spec["damping"]):
        pairwise, own_scores = 0.0, 0.0
        for path, factor in factors.items():
            rule = MeanEigenvalue() if damping == "heuristic" else factor * damping
            layer = Influence(file.objective, fit.select([path]), rule)
            pairwise = pairwise + factor * layer.scores(queries, examples)
            own_scores = own_scores + factor * layer.self_influence(examples)
        assert_close(pairwise, file[f"{key}_pairwise"][i], 1e-9)
        assert_close(own_scores, file[f"{key}_self"][i], 1e-9)


@pytest.mark.parametrize("kind", ["ggn", "ef", "hessian", "identity"])
@pytest.mark.parametrize("name", FILES)
def test_reference_scores_of_whole_matrices(name: str, kind: str, backend: Backend):
    file = load(name, APPLICATIONS)
    fisher = Empirical() if kind == "ef" else Exact()
    fit = reference_fit(file, backend, FullMatrix(), fisher, "y")
    queries, examples = both_batches(file, backend)
    key = kind if kind == "identity" else f"exact_{kind}"
    damping = file.spec[f"exact_damping_{'hessian' if kind == 'hessian' else 'ggn'}"]
    if kind in ("hessian", "identity"):  # matrices of any origin
        order, size = file.order(), len(file["ggn"])
        m = np.eye(size) if kind == "identity" else file["hessian"] + damping * np.eye(size)
        m = backend.asarray(m[np.ix_(order, order)])
        fit, damping = replace(fit, moments={"full": {"matrix": m}}), 0.0
    influence = Influence(file.objective, fit, damping)
    assert_close(influence.scores(queries, examples), file[f"{key}_pairwise"], 1e-8)
    assert_close(influence.self_influence(examples), file[f"{key}_self"], 1e-8)


# --------------------------------------------------------------------------- training without one


def test_reference_leave_one_out(backend: Backend):
    """Ridge regression: first order in 1/N, and exactly what fitting again gives."""
    file = load("influence_linear_loo", APPLICATIONS)
    queries, examples = both_batches(file, backend)
    n, ridge = file.spec["N"], file.spec["ridge"]
    for curvature in (FullMatrix(), BlockDiagonal(ExactBlock()), BlockDiagonal()):
        fit = reference_fit(file, backend, curvature, Exact(), "y")
        influence = Influence(file.objective, fit, ridge)
        scores = influence.scores(queries, examples)
        assert_close(scores, file["pairwise"])
        assert_close(scores / n, file["influence_delta_test_loss"])
        assert_close(influence.self_influence(examples), file["self"])
        assert_close(leave_one_out(influence, queries, examples), file["loo_delta_test_loss"])


def test_leave_one_out_is_fitting_again(backend: Backend):
    """Several outputs, a loss at each of two positions, weights; a part at a time."""
    rng = np.random.default_rng(0)
    x, t, w = rng.normal(size=(7, 2, 3)), rng.normal(size=(7, 2, 2)), rng.uniform(0.5, 2.0, 7)
    terms, ridge, phi = 14, 0.1, np.concatenate([x, np.ones((7, 2, 1))], axis=2)

    def solution(w):
        gram = np.einsum("n,nsi,nsj->ij", w, phi, phi) / terms + ridge * np.eye(4)
        return np.linalg.solve(gram, np.einsum("n,nsi,nsc->ic", w, phi, t) / terms).T

    def losses(W):
        return 0.5 * w * ((phi @ W.T - t) ** 2).sum(axis=(1, 2))

    W = solution(w)
    left = [solution(np.where(np.arange(7) == i, 0.0, w)) for i in range(7)]
    expected = np.stack([losses(each) - losses(W) for each in left], axis=1)
    batch = tuple(map(backend.asarray, (x, t, w)))
    objective = Objective(Dense(3, 2), SquaredError())
    fit = fit_curvature(objective, backend.asarray(W), [batch], FullMatrix())
    for budget in (2**28, 1):
        influence = Influence(objective, fit, ridge, budget)
        assert_close(leave_one_out(influence, batch, batch), expected)


def test_an_example_that_the_curvature_does_not_have_cannot_be_left_out():
    case = CASES["tanh_squared"]
    x, t = batch_of(case, NUMPY)
    influence = influence_of(case, NUMPY, "full", damping=1e-3)
    with pytest.raises(CurvatureError, match=r"example 1: expected leverage < 1, got"):
        leave_one_out(influence, (x, t), (np.stack([x[0], 100 * x[0]]), t[:2]))


# -------------------------------------------------------------------- training on parts of the data


def test_datamodelling_score_is_spearmans_correlation(backend: Backend):
    subsets = random_halves(9, 6, Rng(0), backend)
    assert (host(subsets).sum(axis=1) == 3).all()
    scores = Rng(1).normal((3, 6), backend)
    predicted = -scores @ subsets.T
    losses = backend.xp.stack(
        [predicted[0, :] ** 3, -predicted[1, :], backend.xp.zeros_like(predicted[2, :])], axis=1
    )
    found = linear_datamodelling_score(scores, subsets, losses)
    assert_close(found, np.asarray([1.0, -1.0, 0.0]))
    # ranks 1, 2, 3, 4 against 1, 2.5, 2.5, 4
    tied = linear_datamodelling_score(
        backend.asarray(np.asarray([[-1.0, -2.0, -3.0, -4.0]])),
        backend.asarray(np.eye(4)),
        backend.asarray(np.asarray([[0.0], [1.0], [1.0], [2.0]])),
    )
    assert_close(tied, np.asarray([4.5 / (5.0 * 4.5) ** 0.5]))


def test_scores_foretell_training_on_halves():
    """Linear regression, where they should: and better with the curvature than without."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)) * [1.0, 2.0, 4.0, 8.0]
    t = x @ rng.normal(size=(4, 1)) + rng.normal(size=(60, 1))
    phi = np.concatenate([x, np.ones((60, 1))], axis=1)

    def solution(mask):
        gram = (phi * mask[:, None]).T @ phi / mask.sum() + 0.01 * np.eye(5)
        return np.linalg.solve(gram, phi.T @ (mask[:, None] * t) / mask.sum()).T

    halves = random_halves(40, 60, Rng(0), NUMPY)
    losses = np.stack([0.5 * ((phi[:10] @ solution(m).T - t[:10]) ** 2)[:, 0] for m in halves])
    objective = Objective(Dense(4, 1), SquaredError())
    fit = fit_curvature(objective, solution(np.ones(60)), [(x, t)], FullMatrix())
    found = []
    for damping in (0.01, 1e6):
        scores = Influence(objective, fit, damping).scores((x[:10], t[:10]), (x, t))
        found.append(linear_datamodelling_score(scores, halves, losses).mean())
    assert found[0] > 0.9 > found[1]


# -------------------------------------------------------------------------------------- the rest


def test_extremes_of_each_row(backend: Backend):
    scores = backend.asarray(np.asarray([[0.0, 3.0, -2.0, 1.0], [5.0, 4.0, 7.0, 6.0]]))
    helpful, harmful = extremes(scores, 2)
    assert host(helpful).tolist() == [[1, 3], [2, 3]]
    assert host(harmful).tolist() == [[2, 0], [1, 0]]
    with pytest.raises(InputError, match="expected scores of at least 5 examples"):
        extremes(scores, 5)
    with pytest.raises(InputError, match="extremes scores: expected finite values"):
        extremes(scores * np.nan, 1)
    with pytest.raises(InputError, match="extremes scores: expected an array, got list"):
        extremes([1.0], 1)  # type: ignore[arg-type]


def test_the_page_says_what_works():
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.S | re.M)
    case = CASES["shared_then_flattened"]
    p = case.build(NUMPY)
    x, t = (np.concatenate([a, a, a]) for a in (p.x, p.t))
    names = {"objective": p.objective, "params": p.params, "batches": [(x, t)]}
    names |= {"x": x, "t": t, "x_test": p.x, "t_test": p.t}
    exec(program, names)
    assert names["helpful"].shape == names["harmful"].shape == (4, 10)
    assert names["own"].shape == (12,)


def test_bad_input_is_refused_by_name():
    case = CASES["relu_softmax"]
    p, fit = case.build(NUMPY), fitted(case, NUMPY, "kfac")
    x, t = batch_of(case, NUMPY)
    influence = Influence(p.objective, fit)
    late, unknown = x.copy(), t.copy()
    late[-1, 0], unknown[-1] = np.nan, 3
    for batch, message in [
        ((late, t), "queries: x: expected finite values"),
        ((x, unknown), "queries: SoftmaxCrossEntropy targets: expected class numbers"),
        (x, "queries: expected .* as influence is on losses, got ndarray"),
        ((x, None), r"queries: expected .* got \(ndarray, NoneType\)"),
        ((x[:, :2], t), "queries: "),
        ((x.astype(np.float32), t), "queries: x: expected .*float64"),
        ((x, t[:3]), "queries: t: expected 6 examples, as in x, got 3"),
        ((x, t, -np.ones(6)), "queries: weights: expected a vector of finite numbers >= 0"),
        ((x, t, np.ones((6, 1))), "queries: weights: expected a vector"),
    ]:
        with pytest.raises(InputError, match=message):
            influence.scores(batch, (x, t))
        with pytest.raises(InputError, match=message.replace("queries", "examples")):
            influence.self_influence(batch)
    other = Objective(Sequential(Dense(3, 5), Tanh(), Dense(5, 3)), SoftmaxCrossEntropy())
    with pytest.raises(InputError, match=r"Influence fit: expected one of Sequential"):
        Influence(other, fit)
    coupled = Objective(Sequential(Dense(3, 3), BatchNorm(3)), SquaredError())
    with pytest.raises(InputError, match=r"objective\.evaluation"):
        Influence(coupled, fit)
    with pytest.raises(InputError, match=r"layer 0: damping: expected .* got -1"):
        Influence(p.objective, fit, -1.0)
    with pytest.raises(InputError, match="damping: expected a number for 0, 2 or 4, got 0"):
        Influence(p.objective, fit, {"0": 1.0})
    with pytest.raises(FactorizationError, match=r"layer \d: .*give more damping"):
        Influence(p.objective, fit, 0.0).scores((x, t), (x, t))
    with pytest.raises(ShapeError, match=r"losses \(R, Q\), got \(2, 3\), \(4, 3\) and \(4, 3\)"):
        linear_datamodelling_score(np.ones((2, 3)), np.ones((4, 3)), np.ones((4, 3)))
    with pytest.raises(InputError, match="linear_datamodelling_score losses: expected finite"):
        linear_datamodelling_score(np.ones((2, 3)), np.ones((4, 3)), np.full((4, 2), np.nan))
