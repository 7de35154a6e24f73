"""Matrix-free products against dense matrices by automatic differentiation."""

from __future__ import annotations

import numpy as np
import pytest
from cases import NETWORKS, NetworkCase
from numerics import assert_close, flat
from references.dense import dense

from kfac_np import products, trees
from kfac_np.backend import Backend, Rng, get_backend, to_numpy
from kfac_np.errors import CurvatureError, InputError, ShapeError
from kfac_np.fisher import Empirical, Exact, InputOnly, MonteCarlo


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_products(case: NetworkCase, backend: Backend):
    e, reference, v = case.build(backend).evaluate(), dense(case), case.tangent(backend)
    u = flat(v)
    assert_close(flat(products.ggn_product(e, v)), reference.fisher @ u)
    assert_close(flat(products.fisher_product(e, v, Exact())), reference.fisher @ u)
    assert_close(flat(products.fisher_product(e, v, Empirical())), reference.empirical @ u)
    assert_close(flat(products.hessian_product(e, v)), reference.hessian @ u)


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_monte_carlo_product(case: NetworkCase, backend: Backend):
    """Each term's own square: (1/M) Σ_m w_m (1/K) Σ_k J^T g g^T J v, with the targets drawn."""
    e, reference, v, rng = (
        case.build(backend).evaluate(),
        dense(case),
        case.tangent(backend),
        Rng(2),
    )
    inner = 0.0
    for k in range(3):
        drawn = case.loss.sample_targets(rng.child(k), e.outputs)
        g = reference.output_gradients_at(to_numpy(drawn))
        inner = inner + g[:, :, None] * g[:, None, :] / 3
    product = products.fisher_product(e, v, MonteCarlo(3), rng)
    assert_close(flat(product), reference.curvature(inner) @ flat(v))


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_quadratic_forms(case: NetworkCase, number: int, backend: Backend):
    e = case.build(backend).evaluate()
    vectors = [case.tangent(backend, key) for key in range(number)]
    v = np.stack([flat(u) for u in vectors])
    gram = products.quadratic_forms(e, vectors)
    assert_close(gram, v @ dense(case).fisher @ v.T)
    np.testing.assert_array_equal(to_numpy(gram), to_numpy(gram).T)
    assert Backend.of(gram) == backend


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_forms_of_the_blocks(case: NetworkCase, backend: Backend):
    """v_iᵀ F_ii v_i of each parameter is the form of v with all others at 0."""
    e, v = case.build(backend).evaluate(), case.tangent(backend)
    forms = products.block_forms(e, v, Exact())
    assert list(forms) == [path for path, _ in trees.items(v)]
    for path, form in forms.items():
        alone = trees.map_named(lambda p, u, path=path: u if p == path else 0.0 * u, v)
        assert float(form) == pytest.approx(
            float(products.quadratic_forms(e, [alone])[0, 0]), rel=1e-9, abs=1e-12
        )


def test_bad_vectors_of_forms_by_blocks():
    case = next(c for c in NETWORKS if not c.coupled)
    e = case.build(get_backend("numpy", "float64")).evaluate()
    v = case.tangent(get_backend("numpy", "float64"))
    with pytest.raises(ShapeError):
        products.block_forms(e, (v, v), Exact())
    with pytest.raises(ShapeError, match="expected"):
        products.block_forms(e, trees.tree_map(lambda u: u[:1, :1], v), Exact())
    for fisher in ("exact", None, Exact, InputOnly()):
        with pytest.raises(CurvatureError, match="block_forms: expected Exact, MonteCarlo or Emp"):
            products.block_forms(e, v, fisher)
    for tangents in ([], [e.outputs[:1, ...]]):
        with pytest.raises(InputError, match="tangents: expected arrays of shape"):
            products.tangent_forms(e, tangents)


def test_sampled_forms_of_the_blocks_are_unbiased():
    case = next(c for c in NETWORKS if not c.coupled)
    backend = get_backend("numpy", "float64")
    e, v = case.build(backend).evaluate(), case.tangent(backend)
    exact = products.block_forms(e, v, Exact())
    sampled = products.block_forms(e, v, MonteCarlo(4000), Rng(3))
    for path, form in exact.items():
        assert sampled[path] == pytest.approx(form, rel=0.05)


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_forms_are_those_of_the_products(case: NetworkCase, backend: Backend):
    e = case.build(backend).evaluate()
    v, w = case.tangent(backend, 0), case.tangent(backend, 1)
    gram = to_numpy(products.quadratic_forms(e, [v, w]))
    by_product = float(trees.inner(v, products.ggn_product(e, w)))
    assert by_product == pytest.approx(gram[0, 1], rel=1e-11, abs=1e-12 * np.abs(gram).max())


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_products_are_linear_and_symmetric(case: NetworkCase, backend: Backend):
    e = case.build(backend).evaluate()
    v, w = case.tangent(backend, 0), case.tangent(backend, 1)
    for product in (
        products.ggn_product,
        products.hessian_product,
        lambda e, v: products.fisher_product(e, v, Empirical()),
        lambda e, v: products.fisher_product(e, v, MonteCarlo(2), Rng(4)),
    ):
        cv, cw = product(e, v), product(e, w)
        assert_close(product(e, trees.axpy(-2.0, v, w)), trees.axpy(-2.0, cv, cw), 1e-11)
        size = float(np.abs(flat(v)) @ np.abs(flat(cw)))
        assert abs(float(trees.inner(v, cw)) - float(trees.inner(w, cv))) <= 1e-11 * size


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_products_on_a_part_of_the_batch(case: NetworkCase, backend: Backend):
    """The quadratic model looks at fewer examples: a mean over these."""
    problem, n = case.build(backend), (case.shape[0] + 1) // 2
    v = case.tangent(backend)
    weights = None if problem.weights is None else problem.weights[:n]
    part = problem.objective.evaluate(
        problem.params, problem.x[:n, ...], problem.t[:n, ...], weights
    )
    for product in (products.ggn_product, products.hessian_product):
        assert_close(product(problem.evaluate().take(n), v), product(part, v))


def test_the_hessian_is_the_fisher_where_residuals_vanish(backend: Backend):
    """Gauss-Newton: with targets equal to the model's means nothing but the GGN is left."""
    case = next(c for c in NETWORKS if c.name == "tanh_squared")
    problem, v = case.build(backend), case.tangent(backend)
    z = problem.evaluate().outputs
    e = problem.objective.evaluate(problem.params, problem.x, z)
    assert_close(products.hessian_product(e, v), products.ggn_product(e, v))


def test_what_is_refused(backend: Backend):
    case = NETWORKS[5]
    e, v = case.build(backend).evaluate(), case.tangent(backend)
    with pytest.raises(CurvatureError, match="expected Exact, MonteCarlo or Empirical, got Input"):
        products.fisher_product(e, v, InputOnly())
    with pytest.raises(InputError, match="quadratic_forms: expected at least one vector, got none"):
        products.quadratic_forms(e, [])
    wrong = trees.tree_map(lambda w: w[:, :1], v)
    for product in (products.ggn_product, products.hessian_product):
        with pytest.raises(ShapeError, match="tangent of parameter 0: expected"):
            product(e, wrong)
