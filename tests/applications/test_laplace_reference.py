"""Laplace and sandwich against values of other software, and against dense formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import to_backend
from numerics import flat, host
from reference_files import APPLICATIONS, Reference, load, names

from kfac_np import trees
from kfac_np.applications import (
    FittedCurvature,
    Laplace,
    Sandwich,
    fit_curvature,
    separate_biases,
)
from kfac_np.backend import Backend
from kfac_np.curvature import BlockDiagonal, Curvature, DiagonalBlock, FullMatrix
from kfac_np.fisher import Empirical, Exact, FisherType

STRUCTURES: dict[str, Curvature] = {
    "full": FullMatrix(),
    "kron": BlockDiagonal(),
    "kron_joint": BlockDiagonal(),
    "diag": BlockDiagonal(DiagonalBlock()),
}
KINDS = [f"{last}{structure}" for last in ("", "ll_") for structure in STRUCTURES]


def fitted(
    ref: Reference,
    backend: Backend,
    kind: str,
    data: tuple[str, str] = ("x", "y"),
    weights: tuple[str, str] = ("W", "b"),
    fisher: FisherType | None = None,
) -> FittedCurvature:
    """A fit in two batches, of all layers or of the last."""
    structure = kind.removeprefix("ll_")
    params = to_backend(backend, ref.joint(*weights))
    x, t = (backend.asarray(a) for a in (ref.channels_last(data[0]), ref[data[1]]))
    n = x.shape[0] // 3
    paths = [str(ref.positions[-1])] if kind.startswith("ll_") else None
    batches = [(x[:n, ...], t[:n, ...]), (x[n:, ...], t[n:, ...])]
    curvature = STRUCTURES[structure]
    fit = fit_curvature(ref.objective, params, batches, curvature, fisher, paths=paths)
    return separate_biases(ref.objective, fit) if structure == "kron" else fit


def places(ref: Reference, kind: str) -> Any:
    """Where the entries of `trees.ravel` are in the file's vectors."""
    if not kind.startswith("ll_"):
        return ref.order()
    last = ref.count - 1
    own = ref[f"joint_index{last}"][ref._joint_order(last)]
    return np.searchsorted(ref["last_layer_index"], own)


def as_operand(ref: Reference, fit: FittedCurvature, vector: Any, kind: str) -> dict[str, Any]:
    backend = Backend.of(next(iter(fit.operand.values())))
    return trees.unravel(backend.asarray(vector[places(ref, kind)]), fit.operand)


def close(actual: Any, expected: Any, tolerance: float = 1e-8) -> None:
    actual, expected = host(actual), np.asarray(expected)
    np.testing.assert_allclose(
        actual, expected, rtol=tolerance, atol=tolerance * abs(expected).max()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", names("laplace_mlp", "laplace_cnn", folder=APPLICATIONS))
def test_evidence_and_predictions(name: str, kind: str, backend: Backend):
    ref = load(name, APPLICATIONS)
    fit, x = fitted(ref, backend, kind), backend.asarray(ref.channels_last("x_test"))
    for i, sigma in enumerate(ref.spec["sigma_noise"]):
        for j, delta in enumerate(ref.spec["prior_precision"]):
            laplace = Laplace(ref.objective, fit, delta, sigma, ref.spec["temperature"])
            for quantity, found in {
                "log_lik": laplace.log_likelihood,
                "logdet_ratio": laplace.precision.logdet_ratio,
                "scatter": laplace.scatter,
                "log_marglik": laplace.log_marginal_likelihood,
            }.items():
                close(found, ref[f"{kind}_{quantity}"][i, j], 1e-9)
            variances = ref[f"{kind}_post_var"][i, j][places(ref, kind)]
            close(laplace.precision.variances(), variances)
            prediction = laplace.predict(x)
            close(prediction.outputs, ref["out_test"])
            close(prediction.output_covariance, ref[f"{kind}_f_var"][i, j])
            if f"{kind}_probit" in ref:
                close(prediction.mean, ref[f"{kind}_probit"][i, j])
                close(laplace.predict(x, link="bridge").mean, ref[f"{kind}_bridge"][i, j])
        best = Laplace(ref.objective, fit, 1.0, sigma).tuned(noise=False)
        close(best.prior_precision, ref[f"{kind}_opt_prior"][i], 1e-9)
        close(best.log_marginal_likelihood, ref[f"{kind}_opt_log_marglik"][i], 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", names("laplace_mlp", "laplace_cnn", folder=APPLICATIONS))
def test_priors_of_all_kinds(name: str, kind: str, backend: Backend):
    """A mean, a precision for each tensor, and the quadratic form; at the last σ and δ."""
    ref = load(name, APPLICATIONS)
    fit, x = fitted(ref, backend, kind), backend.asarray(ref.channels_last("x_test"))
    delta, sigma = ref.spec["prior_precision"][-1], ref.spec["sigma_noise"][-1]
    laplace = Laplace(ref.objective, fit, delta, sigma)
    value = ref["ll_value" if kind.startswith("ll_") else "value"]
    moved = fit.insert(as_operand(ref, fit, value, kind))
    close(-2.0 * laplace.log_prob(moved, normalized=False), ref[f"{kind}_square_norm_last"], 1e-9)
    if f"{kind}_joint_f_cov_last" in ref:
        close(laplace.joint_output_covariance(x), ref[f"{kind}_joint_f_cov_last"])
    if kind.startswith("ll_"):
        return
    mean = as_operand(ref, fit, ref["prior_mean_vec"], kind)
    found = Laplace(ref.objective, fit, delta, sigma, prior_mean=mean).log_marginal_likelihood
    close(found, ref[f"{kind}_prior_mean_log_marglik_last"], 1e-9)
    tensors = ref["prior_layerwise"].reshape(-1, 2)
    prior = {}
    for (path, p), (weights, bias) in zip(fit.operand.items(), tensors, strict=True):
        d = np.full(p.shape, weights)
        d[:, -1] = bias
        prior[path] = backend.asarray(d)
    layerwise = Laplace(ref.objective, fit, prior, sigma)
    close(layerwise.log_marginal_likelihood, ref[f"{kind}_layerwise_log_marglik"], 1e-9)
    close(layerwise.outputs(x)[1], ref[f"{kind}_layerwise_f_var"])


@pytest.mark.parametrize("weights", ["same", "changed"])
@pytest.mark.parametrize("kind", ["full", "kron", "diag"])
def test_more_data(kind: str, weights: str, backend: Backend):
    ref = load("laplace_online_mse_relu", APPLICATIONS)
    first = fitted(ref, backend, kind, ("x1", "y1"))
    tree = ref.joint("W", "b")
    if weights == "changed":
        parts = [
            np.concatenate([ref[f"W{i}_second"], ref[f"b{i}_second"][:, None]], axis=1)
            for i in range(ref.count)
        ]
        tree = tuple(parts.pop(0) if i in ref.positions else () for i in range(len(ref.layers)))
    x, t = (backend.asarray(ref[name]) for name in ("x2", "y2"))
    params = to_backend(backend, tree)
    second = fit_curvature(ref.objective, params, [(x, t)], STRUCTURES[kind])
    if kind == "kron":
        second = separate_biases(ref.objective, second)
    spec = ref.spec
    laplace = Laplace(ref.objective, first, spec["prior_precision"], spec["sigma_noise"])
    updated = laplace.updated(second)
    prefix = f"{kind}_{weights}"
    close(updated.log_likelihood, ref[f"{prefix}_log_lik"], 1e-9)
    close(updated.scatter, ref[f"{prefix}_scatter"], 1e-9)
    close(updated.log_marginal_likelihood, ref[f"{prefix}_log_marglik"], 1e-9)
    # W0, b0, W1, b1 of the file are W0|b0, W1|b1 here.
    order, start = [], 0
    for p in fit_shapes(updated):
        w = np.arange(p[0] * (p[1] - 1)).reshape(p[0], -1) + start
        b = np.arange(p[0])[:, None] + start + w.size
        order.append(np.concatenate([w, b], axis=1).ravel())
        start += w.size + b.size
    close(updated.precision.variances(), ref[f"{prefix}_post_var"][np.concatenate(order)])
    close(updated.outputs(backend.asarray(ref["x_test"]))[1], ref[f"{prefix}_f_var"])


def fit_shapes(laplace: Laplace) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in laplace.fit.operand.values()]


def test_a_linear_model_is_bayesian_linear_regression(backend: Backend):
    ref = load("laplace_linear_exact_gp", APPLICATIONS)
    fit, x = fitted(ref, backend, "full"), backend.asarray(ref["x_test"])
    laplace = Laplace(ref.objective, fit, ref.spec["prior_precision"], ref.spec["sigma_noise"])
    prediction = laplace.predict(x)
    close(prediction.mean, ref["exact_mean"], 1e-10)
    close(laplace.joint_output_covariance(x), ref["exact_cov"], 1e-10)
    close(laplace.precision.covariance(), ref["exact_posterior_cov"], 1e-10)
    close(laplace.log_marginal_likelihood, ref["exact_log_evidence"], 1e-10)
    noise = ref.spec["sigma_noise"] ** 2
    close(prediction.variance[:, 0], np.diag(ref["exact_cov"]) + noise, 1e-10)


@pytest.mark.parametrize("name", names("sandwich_logistic", folder=APPLICATIONS))
def test_a_sandwich_of_logistic_regression(name: str, backend: Backend):
    ref = load(name, APPLICATIONS)
    bread, meat = (fitted(ref, backend, "full", fisher=f) for f in (Exact(), Empirical()))
    sandwich = Sandwich(bread, meat)
    close(sandwich.covariance(), ref["sandwich_cov"], 1e-9)
    close(sandwich.standard_errors(), ref["robust_standard_errors"], 1e-9)


@pytest.mark.parametrize("kind", ["full", "kron_joint", "kron", "diag", "kron_exact_meat"])
def test_a_sandwich_of_a_network(kind: str, backend: Backend):
    ref = load("sandwich_mlp_ce_tanh", APPLICATIONS)
    outer = "kron_joint" if kind == "kron_exact_meat" else kind
    inner = "full" if kind == "kron_exact_meat" else kind
    bread = fitted(ref, backend, outer, fisher=Exact())
    meat = fitted(ref, backend, inner, fisher=Empirical())
    sandwich = Sandwich(bread, meat, ref.spec["damping"])
    key = {"kron_joint": "kron", "kron": "kron_sep"}.get(kind, kind)
    order, found = ref.order(), host(sandwich.covariance())
    if kind == "diag":
        close(np.diag(found), ref["diag_cov"][order], 1e-9)
    else:
        close(found, ref[f"{key}_cov"][np.ix_(order, order)], 1e-9)
    np.testing.assert_allclose(
        flat(sandwich.standard_errors()), np.sqrt(np.diag(found)), rtol=1e-10
    )
    v = as_operand(ref, bread, np.arange(len(order), dtype=float), kind)
    np.testing.assert_allclose(flat(sandwich.matvec(v)), found @ flat(v), rtol=1e-9)
