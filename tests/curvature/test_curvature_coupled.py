"""Batch statistics: what K-FAC makes of rows that are not independent, and what is not additive."""

from __future__ import annotations

import autograd
import numpy as np
import pytest
from cases import NetworkCase, networks, to_backend
from curvature_cases import estimate
from numerics import assert_close, host, relative_error
from references.dense import dense as reference_of
from references.networks import apply

from kfac_np import trees
from kfac_np.backend import Backend, Rng
from kfac_np.curvature import BlockDiagonal, ExactBlock
from kfac_np.errors import ShapeError
from kfac_np.fisher import Empirical, Exact, MonteCarlo
from kfac_np.layers import BatchNorm, Dense, Sequential
from kfac_np.losses import SquaredError
from kfac_np.objective import Evaluation, Objective

COUPLED = networks(coupled=True)


def from_the_first_layer(case: NetworkCase) -> np.ndarray:
    """∂z_m/∂s_r, shape (M, C, R, d): outputs by rows of the first layer's outputs."""
    params, x, _, _ = case.host()
    first, *others = case.network.layers
    s = apply(first, params[0], x)

    def outputs(rows):
        h = rows.reshape(s.shape)
        for layer, p in zip(others, params[1:], strict=True):
            h = apply(layer, p, h)
        return h.reshape(case.terms, -1)

    return autograd.jacobian(outputs)(s.reshape(-1, s.shape[-1]))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("case", COUPLED, ids=str)
def test_factors_below_batch_statistics(case: NetworkCase, fisher: str, backend: Backend):
    """G = (1/M) Σ_m w_m Σ_r J_mrᵀ B_m J_mr over all rows r: every term moves with every row."""
    e, reference = case.build(backend).evaluate(), reference_of(case)
    j, g = from_the_first_layer(case), reference.output_gradients
    inner = reference.output_hessians if fisher == "exact" else g[:, :, None] * g[:, None, :]
    expected = np.einsum("m,mcri,mcd,mdrj->ij", reference.weights, j, inner, j, optimize=True)
    moments = estimate(BlockDiagonal(), e, Exact() if fisher == "exact" else Empirical())
    assert_close(moments["0"]["G"], expected / case.terms)
    # Other examples' rows are a good part of it, which per-example statistics would not have.
    positions, rows = case.terms // case.shape[0], j.shape[2] // case.shape[0]
    own = np.kron(np.eye(case.shape[0]), np.ones((positions, rows)))
    alone = np.einsum("m,mr,mcri,mcd,mdrj->ij", reference.weights, own, j, inner, j, optimize=True)
    assert np.trace(alone) < 0.95 * np.trace(expected)


@pytest.mark.parametrize("case", COUPLED, ids=str)
def test_a_pass_for_all_sampled_terms_has_the_same_mean(case: NetworkCase, backend: Backend):
    """One vector a sample carries all terms back at once, the exact Fisher one vector a term."""
    e = case.build(backend).evaluate()
    shapes = [v.shape[0] for v in MonteCarlo(3).vectors(e, Rng(0))]
    assert shapes == [1, 1, 1]
    total = sum(v.shape[0] for v in Exact(1).vectors(e, Rng(0)))
    assert total == case.terms * case.output_shape[-1]
    assert sum(v.shape[0] for v in Empirical().vectors(e, Rng(0))) == case.terms


def evaluate(backend: Backend, case: NetworkCase, rows: slice) -> Evaluation:
    params, x, t, _ = case.host()
    return Objective(case.network, case.loss).evaluate(
        to_backend(backend, params), backend.asarray(x[rows]), backend.asarray(t[rows])
    )


@pytest.mark.parametrize("case", COUPLED, ids=str)
def test_halves_of_a_batch_have_other_statistics(case: NetworkCase, backend: Backend):
    """Neither gradient nor curvature is a mean over parts, and nothing says that it is."""
    half = case.shape[0] // 2
    whole = evaluate(backend, case, slice(None))
    parts = [evaluate(backend, case, rows) for rows in (slice(half), slice(half, None))]
    mean = trees.scale(0.5, trees.axpy(1.0, *(e.gradient() for e in parts)))
    assert relative_error(mean, whole.gradient()) > 0.01
    blocks = BlockDiagonal(ExactBlock())
    first, second = (estimate(blocks, e) for e in parts)
    mean = trees.scale(0.5, trees.axpy(1.0, first, second))
    assert relative_error(mean, estimate(blocks, whole)) > 1e-3


def test_after_training_an_example_has_its_own_curvature_again(backend: Backend):
    """With frozen statistics nothing is coupled: one example will do, moments are means again."""
    case = networks(name="batch_norm_softmax")[0]
    e = evaluate(backend, case, slice(None))
    fixed = e.objective.evaluation(e.params, e.inputs)
    whole = fixed.evaluate(e.params, e.inputs, e.targets)
    assert not whole.scale.coupled
    assert whole.value == pytest.approx(e.value, rel=1e-13)
    blocks = BlockDiagonal(ExactBlock())
    each = [
        estimate(blocks, fixed.evaluate(e.params, e.inputs[i : i + 1, ...], e.targets[i : i + 1]))
        for i in range(case.shape[0])
    ]
    mean = np.mean([host(m) for m in each], axis=0)
    assert_close(mean, host(estimate(blocks, whole)))
    # The derivative through the statistics is what the coupled curvature has besides.
    assert relative_error(estimate(blocks, whole), estimate(blocks, e)) > 0.05


def test_one_example_is_refused_where_it_is_forwarded(backend: Backend):
    network = Sequential(Dense(3, 2), BatchNorm(2))
    params = network.init(Rng(0), backend)
    objective = Objective(network, SquaredError())
    e = objective.evaluate(params, Rng(1).normal((4, 3), backend), backend.zeros((4, 2)))
    match = r"^layer 1: BatchNorm\(2\): expected at least two values for each channel"
    with pytest.raises(ShapeError, match=match):
        e.take(1)
    with pytest.raises(ShapeError, match=match):
        objective.evaluation(params, backend.ones((1, 3)))
