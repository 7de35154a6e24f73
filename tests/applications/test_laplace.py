"""Laws of Laplace's approximation: against dense matrices, differences and its own optimum."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cases import NETWORKS, NetworkCase
from numerics import flat, host

from kfac_np import trees
from kfac_np.applications import Laplace, Prediction, Sandwich, fit_curvature, separate_biases
from kfac_np.backend import Array, Backend, Rng
from kfac_np.curvature import (
    EKFAC,
    BlockDiagonal,
    BlockTridiagonal,
    Curvature,
    DiagonalBlock,
    FullMatrix,
)
from kfac_np.errors import ConfigError, CurvatureError, InputError, KfacError, ShapeError
from kfac_np.layers import BatchNorm, Dense, Sequential, Tanh
from kfac_np.losses import PoissonLogRate, SoftmaxCrossEntropy, SquaredError
from kfac_np.objective import Objective

CASES = {c.name: c for c in NETWORKS}
KINDS: dict[str, Curvature] = {
    "kfac": BlockDiagonal(),
    "ekfac": EKFAC(),
    "diagonal": BlockDiagonal(DiagonalBlock()),
    "full": FullMatrix(),
    "tridiagonal": BlockTridiagonal(split=True),
}
SHAPES = [
    CASES[name]
    for name in (
        "conv_softmax",  # locations, weights
        "conv1d_depthwise_squared",  # groups
        "layer_norm_softmax",  # scale and shift
        "embedding_positions",  # several terms an example, inputs that are indices
        "positions_mixed_squared",
    )
]


def fitted(case: NetworkCase, backend: Backend, kind: str, **options: Any):
    p = case.build(backend)
    batch = (p.x, p.t) if p.weights is None else (p.x, p.t, p.weights)
    return p, fit_curvature(p.objective, p.params, [batch], KINDS[kind], **options)


def noise_of(case: NetworkCase) -> float:
    return 0.7 if isinstance(case.loss, SquaredError) else 1.0


def uneven_prior(laplace_fit: Any) -> dict[str, float]:
    return {path: 0.3 * (i + 1.0) for i, path in enumerate(laplace_fit.paths)}


def dense_precision(laplace: Laplace) -> Any:
    """P, from the fit's matrix written out."""
    fit = laplace.fit
    given = laplace.prior_precision
    prior = given if isinstance(given, dict) else dict.fromkeys(fit.paths, given)
    diagonal = [host(p) * 0.0 + host(prior[path]) for path, p in fit.operand.items()]
    h = fit.terms / (laplace.noise**2 * laplace.temperature)
    return h * host(fit.matrix.to_dense()) + np.diag(np.concatenate([d.ravel() for d in diagonal]))


def jacobian(laplace: Laplace, e: Any) -> Any:
    """(outputs, parameters), forwards: a column for each parameter."""
    operand = laplace.fit.operand
    backend = Backend.of(next(iter(operand.values())))
    zeros = trees.zeros_like(laplace.fit.params)
    columns = []
    for path, p in operand.items():
        for i in range(math.prod(p.shape)):
            unit = np.zeros(math.prod(p.shape))
            unit[i] = 1.0
            v = trees.map_named(
                lambda q, z, path=path, unit=unit, p=p: (
                    backend.asarray(unit.reshape(p.shape)) if q == path else z
                ),
                zeros,
            )
            columns.append(host(e.jvp(v)).ravel())
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_outputs_have_the_covariance_of_their_jacobian(
    case: NetworkCase, kind: str, backend: Backend
):
    """J P⁻¹ Jᵀ, its diagonal and all of it at once; of two examples at a time, too."""
    p, fit = fitted(case, backend, kind)
    e = p.evaluate()
    for prior in (0.5, uneven_prior(fit)):
        laplace = Laplace(p.objective, fit, prior, noise_of(case), temperature=0.8)
        j = jacobian(laplace, e)
        expected = j @ np.linalg.solve(dense_precision(laplace), j.T)
        size = {"rtol": 1e-7, "atol": 1e-9 * abs(expected).max()}
        np.testing.assert_allclose(host(laplace.joint_output_covariance(p.x)), expected, **size)
        f, covariance = laplace.outputs(p.x)
        np.testing.assert_array_equal(host(f), host(e.outputs))
        starts = range(0, len(expected), f.shape[-1])
        each = [expected[i : i + f.shape[-1], i : i + f.shape[-1]] for i in starts]
        each = np.stack(each).reshape(covariance.shape)
        np.testing.assert_allclose(host(covariance), each, **size)
        diagonal = np.diag(expected).reshape(f.shape)
        np.testing.assert_allclose(host(laplace.outputs(p.x, diagonal=True)[1]), diagonal, **size)
    slow = Laplace(p.objective, fit, prior, noise_of(case), temperature=0.8, budget_bytes=1)
    np.testing.assert_allclose(host(slow.outputs(p.x)[1]), each, **size)


@pytest.mark.parametrize("kind", KINDS)
def test_the_posterior_is_the_gaussian_of_its_precision(kind: str, backend: Backend):
    """Products, solutions, determinants, variances, samples and log-probabilities."""
    case = CASES["conv1d_depthwise_squared"]
    p, fit = fitted(case, backend, kind)
    d = {path: 1.0 + 0.1 * i for i, path in enumerate(fit.paths)}
    arrays = {path: abs(q) + 0.2 for path, q in fit.operand.items()}
    for prior in (0.4, d, arrays):
        laplace = Laplace(p.objective, fit, prior, noise=0.7)
        P, precision = dense_precision(laplace), laplace.precision
        cov = np.linalg.inv(P)
        v = trees.unravel(backend.asarray(np.arange(len(P)) / len(P) - 0.4), fit.operand)
        np.testing.assert_allclose(flat(precision.matvec(v)), P @ flat(v), rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(flat(precision.solve(v)), cov @ flat(v), rtol=1e-7, atol=1e-10)
        np.testing.assert_allclose(host(precision.covariance()), cov, rtol=1e-7, atol=1e-10)
        np.testing.assert_allclose(flat(precision.variances()), np.diag(cov), rtol=1e-8)
        logdet = precision.logdet_ratio + precision.logdet_prior
        assert logdet == pytest.approx(np.linalg.slogdet(P)[1], rel=1e-10)
        drawn = np.stack(list(map(flat, unit_draws(precision, len(P)))))
        np.testing.assert_allclose(drawn.T @ drawn, cov, rtol=1e-7, atol=1e-10)
        moved = fit.insert(trees.axpy(1.0, v, fit.operand))
        expected = 0.5 * (logdet - len(P) * math.log(2 * math.pi) - flat(v) @ P @ flat(v))
        assert laplace.log_prob(moved) == pytest.approx(expected, rel=1e-9)


def unit_draws(precision: Any, n: int) -> Iterator[Any]:
    """What is drawn when one of the normal numbers is 1 and the others are 0: roots of P⁻¹."""

    class OneAtATime:
        def __init__(self, which: int) -> None:
            self.left = which

        def normal(self, shape: tuple[int, ...], backend: Backend) -> Array:
            z = np.zeros(math.prod(shape))
            if 0 <= self.left < len(z):
                z[self.left] = 1.0
            self.left -= len(z)
            return backend.asarray(z.reshape(shape))

    return (precision.sample(OneAtATime(i)) for i in range(n))


def test_samples_are_around_the_parameters(backend: Backend):
    p, fit = fitted(CASES["relu_softmax"], backend, "kfac", paths=["4"])
    laplace, rng = Laplace(p.objective, fit, 1e4), Rng(0)
    first, second = laplace.sample(rng), laplace.sample(rng)
    d = host(trees.axpy(-1.0, p.params, first))
    held = len(d) - math.prod(fit.operand["4"].shape)
    assert (d[:held] == 0.0).all()
    assert (abs(d[held:]) < 0.05).all()
    assert (host(first) != host(second))[held:].all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_marginal_likelihood_has_these_derivatives_and_this_maximum(
    kind: str, backend: Backend
):
    for case in (CASES["tanh_squared"], CASES["weighted_softmax"]):
        p, fit = fitted(case, backend, kind)
        sigma = noise_of(case)
        laplace = Laplace(p.objective, fit, uneven_prior(fit), sigma)
        by_prior, by_noise = laplace.log_derivatives()
        h = 1e-5

        def evidence(prior: dict[str, float], noise: float, p: Any = p, fit: Any = fit) -> float:
            return Laplace(p.objective, fit, prior, noise).log_marginal_likelihood

        for path in fit.paths:
            ends = [
                evidence(
                    {**laplace.prior_precision, path: laplace.prior_precision[path] * s}, sigma
                )
                for s in (math.exp(h), math.exp(-h))
            ]
            assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(
                by_prior[path], rel=1e-6, abs=1e-7
            )
        if isinstance(case.loss, SquaredError):
            ends = [evidence(laplace.prior_precision, sigma * math.exp(s)) for s in (h, -h)]
            assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(by_noise, rel=1e-6)
        common = Laplace(p.objective, fit, 7.0, sigma).tuned()
        best = laplace.tuned(per_layer=True)
        slopes, slope = best.log_derivatives()
        assert max(map(abs, (*slopes.values(), slope))) < 1e-8
        slopes, slope = common.log_derivatives()
        assert max(abs(sum(slopes.values())), abs(slope)) < 1e-8
        assert isinstance(common.prior_precision, float)
        assert best.log_marginal_likelihood >= common.log_marginal_likelihood
        assert common.log_marginal_likelihood > laplace.log_marginal_likelihood - 50.0
        elsewhere = Laplace(p.objective, fit, 1e-6, 10 * sigma if sigma != 1 else 1.0)
        assert elsewhere.tuned().prior_precision == pytest.approx(common.prior_precision, rel=1e-8)


def test_tuning_has_no_optimum_without_information(backend: Backend):
    p, fit = fitted(CASES["relu_softmax"], backend, "kfac")
    mean = dict(fit.operand)
    with pytest.raises(InputError, match="no maximum in the prior precision of 0, 2, 4"):
        Laplace(p.objective, fit, prior_mean=mean).tuned()
    e = Objective(Dense(2, 1, bias=False), SquaredError())
    w, x = backend.asarray(np.ones((1, 2))), backend.asarray(np.eye(2))
    exact = fit_curvature(e, w, [(x, x @ w.T)])
    with pytest.raises(InputError, match="fits its targets exactly; expected noise=False"):
        Laplace(e, exact).tuned()
    assert Laplace(e, exact).tuned(noise=False).log_derivatives()[0][""] == pytest.approx(0.0)


@pytest.mark.parametrize("unit", [1e-12, 1e12])
@pytest.mark.parametrize("kind", ["kfac", "full"])
def test_tuning_knows_no_units(kind: str, unit: float, backend: Backend):
    """Targets and the last layer in other units: σ has theirs, δ of this layer their inverse's."""
    found = []
    for u in (1.0, unit):
        p = CASES["tanh_squared"].build(backend)
        *first, last = p.params
        path = str(len(first))
        fit = fit_curvature(
            p.objective, (*first, u * last), [(p.x, u * p.t)], KINDS[kind], paths=[path]
        )
        best = Laplace(p.objective, fit).tuned()
        found += [best.noise / u, best.prior_precision * u**2]
    assert found[2:] == pytest.approx(found[:2], rel=1e-9)


def regression(backend: Backend, n: int = 10, validation: int = 200):
    """A linear model half way from the truth to least squares, so that δ has a best value."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n + validation, 5))
    true = rng.standard_normal((2, 6))
    homogeneous = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    t = homogeneous @ true.T + 0.5 * rng.standard_normal((len(x), 2))
    squares = np.linalg.lstsq(homogeneous[:n], t[:n])[0].T
    x, t = backend.asarray(x), backend.asarray(t)
    objective = Objective(Dense(5, 2), SquaredError())
    w = backend.asarray(0.5 * (true + squares))
    fit = fit_curvature(objective, w, [(x[:n, ...], t[:n, ...])], FullMatrix())
    return objective, fit, (x[n:, ...], t[n:, ...])


def test_tuning_on_validation_data_is_lowest_there(backend: Backend):
    objective, fit, (x, t) = regression(backend)
    for noise in (True, False):
        best = Laplace(objective, fit, 3.0, 0.6).tuned_on(
            [(x[:9, ...], t[:9, ...]), (x[9:, ...], t[9:, ...])], noise=noise
        )
        assert 1e-3 < best.prior_precision < 1e3  # and not at an end of the range
        at_best = best.predict(x).nll(t)
        for a, b in itertools.product((0.8, 1.0, 1.25), repeat=2):
            sigma = best.noise * (b if noise else 1.0)
            near = Laplace(objective, fit, best.prior_precision * a, sigma).predict(x).nll(t)
            assert near >= at_best - 1e-7
        assert (best.noise == 0.6) != noise
    case = CASES["relu_softmax"]
    p, classes = fitted(case, backend, "kfac")
    best = Laplace(p.objective, classes).tuned_on([(p.x, p.t)])
    values = [
        Laplace(p.objective, classes, best.prior_precision * s).predict(p.x).nll(p.t)
        for s in (0.9, 1.0, 1.1)
    ]
    assert min(values) == values[1] or best.prior_precision >= 0.9e4  # it may lie at the end


def test_the_density_of_targets(backend: Backend):
    """Of two outputs that are correlated, and of classes by every link."""
    objective, fit, (x, t) = regression(backend)
    prediction = Laplace(objective, fit, 1.0, 0.5).predict(x)
    expected = 0.0
    for r, s in zip(host(t - prediction.mean), host(prediction.covariance), strict=True):
        expected += 0.5 * (r @ np.linalg.solve(s, r) + np.linalg.slogdet(2 * np.pi * s)[1])
    assert prediction.nll(t) == pytest.approx(expected / x.shape[0], rel=1e-12)
    np.testing.assert_allclose(
        host(prediction.variance), host(prediction.covariance).diagonal(axis1=1, axis2=2)
    )
    for case in (CASES["relu_softmax"], CASES["logistic_sigmoid"]):
        p, fit = fitted(case, backend, "kfac")
        softmax = isinstance(case.loss, SoftmaxCrossEntropy)
        laplace = Laplace(p.objective, fit, 0.5)
        known = laplace.predict(p.x, link="map")
        e = p.evaluate()
        assert known.nll(p.t) == pytest.approx(e.value, rel=1e-9)
        for link in ("probit", "monte-carlo", *(["bridge"] if softmax else [])):
            found = laplace.predict(p.x, link=link)
            if softmax:
                np.testing.assert_allclose(host(found.mean).sum(axis=-1), 1.0)
            else:  # less sure than without uncertainty
                assert (abs(host(found.mean) - 0.5) < abs(host(known.mean) - 0.5) + 0.02).all()
            sure = Laplace(p.objective, fit, 1e14).predict(p.x, link=link, samples=5)
            if link != "bridge":
                np.testing.assert_allclose(host(sure.mean), host(known.mean), rtol=1e-5)


def test_monte_carlo_averages_over_logits(backend: Backend):
    """Against Gauss-Hermite for one logit."""
    objective = Objective(Dense(2, 1), CASES["logistic_sigmoid"].loss)
    x, w = (
        backend.asarray(np.asarray([[1.0, -2.0]])),
        backend.asarray(np.asarray([[1.0, 0.2, 0.5]])),
    )
    fit = fit_curvature(objective, w, [(x, backend.asarray(np.ones((1, 1))))], FullMatrix())
    laplace = Laplace(objective, fit, 2.0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    f, v = (float(host(a).ravel()[0]) for a in laplace.outputs(x))
    exact = (weights / (1 + np.exp(-f - nodes * v**0.5))).sum() / weights.sum()
    found = float(host(laplace.predict(x, link="monte-carlo", samples=20_000).mean)[0, 0])
    assert found == pytest.approx(exact, abs=4 * 0.3 / 20_000**0.5)


def test_single_precision_is_kept():
    backend = Backend.of(np.zeros(1, dtype=np.float32))
    p, fit = fitted(CASES["conv_softmax"], backend, "kfac")
    double = fitted(CASES["conv_softmax"], Backend.of(np.zeros(1)), "kfac")
    laplace = Laplace(p.objective, fit, 0.5)
    prediction = laplace.predict(p.x)
    expected = Laplace(double[0].objective, double[1], 0.5)
    assert prediction.mean.dtype == prediction.output_covariance.dtype == np.float32
    np.testing.assert_allclose(prediction.mean, expected.predict(double[0].x).mean, rtol=1e-4)
    assert {x.dtype for x in laplace.precision.variances().values()} == {np.dtype(np.float32)}
    assert {x.dtype for x in trees.leaves(laplace.sample(0))} == {np.dtype(np.float32)}
    assert laplace.log_marginal_likelihood == pytest.approx(
        expected.log_marginal_likelihood, rel=1e-5
    )


def test_biases_apart(backend: Backend):
    for case in (CASES["conv1d_depthwise_squared"], CASES["relu_softmax"]):
        p, fit = fitted(case, backend, "kfac")
        joint, apart = (
            {path: host(b.to_dense()) for path, b in trees.items(f.matrix.blocks)}
            for f in (fit, separate_biases(p.objective, fit))
        )
        for path, q in fit.operand.items():
            is_bias = np.arange(math.prod(q.shape)) % q.shape[-1] == q.shape[-1] - 1
            same = is_bias[:, None] == is_bias[None, :]
            np.testing.assert_array_equal(apart[path], np.where(same, joint[path], 0.0))
    p, fit = fitted(CASES["deep_linear_no_bias"], backend, "kfac")
    assert (
        host(separate_biases(p.objective, fit).matrix.to_dense()) == host(fit.matrix.to_dense())
    ).all()
    with pytest.raises(CurvatureError, match=r"expected a fit of BlockDiagonal\(\), got EKFAC"):
        separate_biases(p.objective, fitted(case, backend, "ekfac")[1])


def refused(function: Any, error: type[KfacError], message: str) -> None:
    with pytest.raises(error, match=message):
        function()


def test_bad_input_is_refused_by_name(backend: Backend):
    p, fit = fitted(CASES["relu_softmax"], backend, "kfac")
    o, ones = p.objective, {path: backend.ones(q.shape) for path, q in fit.operand.items()}
    other = Objective(Sequential(Dense(3, 2), Tanh()), SoftmaxCrossEntropy())
    coupled = Objective(Sequential(Dense(3, 3), BatchNorm(3)), SoftmaxCrossEntropy())
    counts = Objective(o.network, PoissonLogRate())
    for function, error, message in [
        (
            lambda: Laplace(other, fit),
            InputError,
            r"Laplace fit: expected one of Sequential\(Dense",
        ),
        (lambda: Laplace(coupled, fit), InputError, r"objective\.evaluation"),
        (lambda: Laplace(counts, fit), CurvatureError, "got PoissonLogRate"),
        (lambda: Laplace(o, o), ConfigError, "Laplace fit: expected a FittedCurvature"),
        (lambda: Laplace(o, fit, -1.0), ConfigError, "prior_precision: expected a number > 0"),
        (lambda: Laplace(o, fit, {"0": 1.0}), ConfigError, "expected one for each of 0, 2 or 4"),
        (lambda: Laplace(o, fit, {**ones, "2": 0}), ConfigError, "prior_precision 2: expected a"),
        (
            lambda: Laplace(o, fit, {**ones, "2": ones["0"]}),
            ConfigError,
            "precision 2: expected a n",
        ),
        (lambda: Laplace(o, fit, {**ones, "2": -ones["2"]}), ConfigError, "precision 2: .*> 0"),
        (lambda: Laplace(o, fit, noise=2.0), ConfigError, "only squared error has noise"),
        (lambda: Laplace(o, fit, temperature=0.0), ConfigError, "temperature: expected a number"),
        (lambda: Laplace(o, fit, prior_mean={"0": ones["0"]}), ShapeError, "expected shapes"),
        (lambda: Laplace(o, fit, prior_mean=3), ConfigError, "prior_mean: expected a Mapping"),
        (
            lambda: Laplace(o, fit, prior_mean={**ones, "2": np.nan * ones["2"]}),
            InputError,
            "prior_mean 2: expected finite",
        ),
        (lambda: Laplace(o, fit).updated(None), ConfigError, "updated fit: expected a Fitted"),
        (lambda: Laplace(o, fit).tuned_on([]), InputError, "tuned_on batches: expected at least"),
        (
            lambda: Laplace(o, fit).tuned_on((p.x, p.t)),
            InputError,
            r"tuned_on batch 0: expected a tuple \(x, t\), got",
        ),
        (lambda: Laplace(o, fit).tuned_on(None), ConfigError, "tuned_on batches: .* got None"),
        (lambda: Laplace(o, fit).predict(p.x, link="logit"), ConfigError, "link: expected probit"),
        (lambda: Laplace(o, fit).predict(p.x[:, :1]), ShapeError, "expected inputs"),
        (lambda: Laplace(o, fit).predict(p.x).covariance, CurvatureError, "SquaredError"),
        (lambda: Laplace(o, fit).predict(p.x).nll(p.t[:1]), InputError, "expected class numbers"),
        (
            lambda: Laplace(o, fit).log_prob(p.params[:1]),
            ShapeError,
            "expected a leaf at 2 or 4, got 0",
        ),
    ]:
        refused(function, error, message)
    one = backend.asarray(np.zeros((1, 2), dtype=np.float32), dtype=backend.xp.float32)
    refused(lambda: Laplace(o, fit).predict(one), InputError, "x: expected")
    half = fit_curvature(o, p.params, [(p.x[:2, ...], p.t[:2, ...])])
    refused(lambda: Sandwich(fit, half), InputError, "expected a fit to .* terms")
    moved = fit_curvature(o, trees.scale(2.0, p.params), [(p.x, p.t)])
    refused(lambda: Sandwich(fit, moved), InputError, "at the parameters of the bread")
    assert isinstance(Laplace(o, fit).predict(p.x), Prediction)
