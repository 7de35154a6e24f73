"""What the block-tridiagonal inverse is: laws of whole matrices, on every backend."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from cases import NetworkCase, networks
from curvature_cases import FISHERS, estimate
from numerics import EPS, assert_close, flat, frobenius_distance, host
from tridiagonal_dense import factors_of
from tridiagonal_problems import REGULAR, batch, regular

from kfac_np import trees
from kfac_np.backend import Backend, Rng
from kfac_np.curvature import (
    BlockDiagonal,
    BlockTridiagonal,
    FullKronecker,
    KFACBlock,
    reduce,
)
from kfac_np.errors import CurvatureError, FactorizationError
from kfac_np.fisher import Empirical, Exact, FisherType, InputOnly, MonteCarlo
from kfac_np.losses import (
    SoftmaxCrossEntropy,
)
from kfac_np.objective import Evaluation
from kfac_np.testing import check_curvature

CURVATURE, FULL = BlockTridiagonal(), FullKronecker()
CHAINS = [
    case
    for case in networks()
    if case.name
    in (
        "dense_alone",
        "one_example_softmax",
        "tanh_squared",
        "relu_softmax",
        "leaky_softmax_soft",
        "logistic_sigmoid",
        "silu_softplus_sigmoid",
        "weighted_softmax",
        "flattened_image",
        "positions_linear",
        "positions_softmax",
        "positions_mixed_softmax",
    )
]


def inverse_of(curvature: Any, e: Evaluation, damping: float, fisher: FisherType | None = None):
    """Every column of solve, and the events."""
    factors, events = curvature.factorise(estimate(curvature, e, fisher), damping)
    size = len(flat(trees.ravel(e.params)))
    columns = [
        flat(trees.ravel(curvature.solve(factors, trees.unravel(e_i, e.params))))
        for e_i in (Backend.of(trees.leaves(e.params)[0]).asarray(row) for row in np.eye(size))
    ]
    return np.stack(columns, axis=1), events


# ------------------------------------------------------------------------------- the matrix


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("case", CHAINS, ids=str)
def test_all_kronecker_products_from_their_definition(backend, case: NetworkCase, fisher: str):
    e = case.build(backend).evaluate()
    matrix = FULL.matrix(estimate(FULL, e, FISHERS[fisher]), e.params)
    assert_close(matrix.to_dense(), factors_of(e, FISHERS[fisher]).f_tilde())


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("case", CHAINS, ids=str)
def test_the_matrix_agrees_on_neighbours(backend: Backend, case: NetworkCase, fisher: str):
    """Of singular moments, too (by pseudo-inverses): most of these networks have some."""
    e = case.build(backend).evaluate()
    matrix = CURVATURE.matrix(estimate(CURVATURE, e, FISHERS[fisher]), e.params)
    found, expected = host(matrix.to_dense()), factors_of(e, FISHERS[fisher])
    full, top = expected.f_tilde(), np.max(np.abs(expected.f_tilde()))
    for i, j in itertools.combinations_with_replacement(range(len(expected.slices)), 2):
        if j - i <= 1:
            rows, columns = expected.slices[i], expected.slices[j]
            assert np.max(np.abs(found[rows, columns] - full[rows, columns])) <= 1e-12 * top
    v = case.tangent(backend)
    assert_close(trees.ravel(matrix.matvec(v)), found @ flat(trees.ravel(v)), 1e-11)
    assert_close(matrix.trace(), np.trace(found))
    assert_close(matrix.frobenius_norm(), np.linalg.norm(found))
    assert np.linalg.eigvalsh(found)[0] >= -1e-12 * top


def test_the_inverse_is_tridiagonal_and_the_matrix_is_not(backend: Backend):
    e = regular(backend)
    parts = factors_of(e, Exact()).slices
    matrix = host(CURVATURE.matrix(estimate(CURVATURE, e), e.params).to_dense())
    inverse = np.linalg.inv(matrix)
    scale, condition = np.max(np.abs(inverse)), np.linalg.cond(matrix)
    for i, j in itertools.combinations(range(len(parts)), 2):
        beyond = np.max(np.abs(inverse[parts[i], parts[j]]))
        assert (beyond <= 10 * EPS * condition * scale) == (j - i > 1)
        if j - i > 1:
            block = matrix[parts[i], parts[j]]
            assert np.linalg.norm(block) > 1e-3 * np.linalg.norm(matrix[parts[i], parts[i]])


def test_among_all_matrices_with_these_blocks_it_has_the_largest_determinant(backend: Backend):
    """The completion of maximal entropy: any change beyond the neighbours lowers log det."""
    e = regular(backend)
    matrix = CURVATURE.matrix(estimate(CURVATURE, e), e.params)
    dense, parts = host(matrix.to_dense()), factors_of(e, Exact()).slices
    logdet = np.linalg.slogdet(dense)[1]
    assert float(host(matrix.logdet())) == pytest.approx(logdet, rel=1e-9)
    rng = np.random.default_rng(0)
    smallest = np.linalg.eigvalsh(dense)[0]
    for _ in range(5):
        change = np.zeros_like(dense)
        for i, j in itertools.combinations(range(len(parts)), 2):
            if j - i > 1:
                change[parts[i], parts[j]] = rng.standard_normal(change[parts[i], parts[j]].shape)
        change = change + change.T
        change *= 0.5 * smallest / np.linalg.norm(change, 2)
        assert np.linalg.slogdet(dense + change)[1] < logdet
    full = host(FULL.matrix(estimate(FULL, e), e.params).to_dense())
    assert np.linalg.slogdet(full)[1] < logdet


def test_dense_operations_of_the_matrix(backend: Backend):
    """Solve, powers and samples of F̂ + λI itself."""
    e = regular(backend)
    matrix = CURVATURE.matrix(estimate(CURVATURE, e), e.params)
    v, dense = e.gradient(), host(matrix.to_dense())
    damped = dense + 0.1 * np.eye(len(dense))
    assert_close(trees.ravel(matrix.solve(v, 0.1)), np.linalg.solve(damped, flat(trees.ravel(v))))
    root = matrix.power(0.5, 0.1)
    assert_close(trees.ravel(root.matvec(root.matvec(v))), damped @ flat(trees.ravel(v)))
    assert trees.ravel(matrix.sample(Rng(0), 0.1, inverse=True)).shape == (len(dense),)


# ------------------------------------------------------------------------------- the inverse


@pytest.mark.parametrize("positions", [(), (2,)], ids=["", "positions"])
def test_without_damping_it_is_the_inverse_of_the_matrix(backend: Backend, positions):
    e = regular(backend, positions)
    found, events = inverse_of(CURVATURE, e, 0.0)
    assert not events
    matrix = host(CURVATURE.matrix(estimate(CURVATURE, e), e.params).to_dense())
    assert_close(found, np.linalg.inv(matrix), 100 * EPS * np.linalg.cond(matrix))
    expected = factors_of(e, Exact())
    condition = np.linalg.cond(expected.f_tilde())
    assert condition < 1e8
    assert_close(found, expected.inverse(), 100 * EPS * condition)


@pytest.mark.parametrize("damping", [1e-4, 0.05, 10.0])
@pytest.mark.parametrize("fisher", [Exact(), Empirical(), MonteCarlo(2)], ids=repr)
@pytest.mark.parametrize("case", CHAINS, ids=str)
def test_with_damping_it_is_the_dense_inverse(backend, case: NetworkCase, fisher, damping: float):
    e = case.build(backend).evaluate()
    found, events = inverse_of(CURVATURE, e, damping, fisher)
    assert not events
    expected = factors_of(e, fisher).damped(damping)
    condition = np.linalg.cond(expected.f_tilde())
    assert_close(found, expected.inverse(), 1e-13 + 20 * EPS * condition)
    assert_close(found, found.T, 1e-13 + 20 * EPS * condition)
    assert np.linalg.eigvalsh(0.5 * (found + found.T))[0] > 0


@pytest.mark.parametrize("case", CHAINS, ids=str)
def test_what_the_coupling_adds(backend: Backend, case: NetworkCase):
    """Nothing for a single layer; else it differs from K-FAC, and comes nearer to F̃⁻¹."""
    e = case.build(backend).evaluate()
    ours, _ = inverse_of(CURVATURE, e, 0.05)
    plain, _ = inverse_of(BlockDiagonal(), e, 0.05)
    full, _ = inverse_of(FULL, e, 0.05)
    if len(factors_of(e, Exact()).slices) == 1:
        assert_close(ours, plain, 1e-14)
    else:
        assert frobenius_distance(plain, full) > 0.003
    assert frobenius_distance(ours, full) <= frobenius_distance(plain, full) + 1e-13
    if len(factors_of(e, Exact()).slices) <= 2:  # then there is nothing beyond the neighbours
        assert_close(ours, full)


def test_exact_damping_of_all_kronecker_products(backend: Backend):
    e = regular(backend)
    curvature = FullKronecker(KFACBlock(exact_damping=True))
    found, _ = inverse_of(curvature, e, 0.1)
    dense = factors_of(e, Exact()).f_tilde()
    assert_close(found, np.linalg.inv(dense + 0.1 * np.eye(len(dense))))


# ------------------------------------------------------------------------------- refusals


def test_the_checker_for_curvatures(backend: Backend):
    e = regular(backend)
    for curvature in (CURVATURE, BlockTridiagonal(KFACBlock(sharing=reduce)), FULL):
        check_curvature(curvature, e.objective, e.params, *data_of(backend, e), fisher=Exact())


def data_of(backend: Backend, e: Evaluation) -> tuple[Any, Any]:
    """Inputs of the batch, as ā of the first layer has them, and targets."""
    return e.backward(e.output_gradient())[0].a[:, 0, :2], e.targets


def test_input_only_is_refused(backend: Backend):
    e = regular(backend)
    for curvature in (CURVATURE, FULL):
        with pytest.raises(CurvatureError, match=r"layer 0: .* expected a Fisher type with"):
            estimate(curvature, e, InputOnly())


def test_exact_damping_is_refused():
    with pytest.raises(CurvatureError, match="expected a KFACBlock with factored damping, got"):
        BlockTridiagonal(KFACBlock(exact_damping=True))


def test_a_network_too_large_for_a_whole_matrix(backend: Backend):
    e = regular(backend)
    size = len(flat(trees.ravel(e.params)))
    with pytest.raises(CurvatureError, match=f"at most {size - 1} parameters, got {size}"):
        estimate(FullKronecker(max_parameters=size - 1), e)


def test_a_whole_matrix_of_a_large_chain_is_refused(monkeypatch, backend: Backend):
    e = regular(backend)
    matrix = CURVATURE.matrix(estimate(CURVATURE, e), e.params)
    monkeypatch.setattr("kfac_np.matrices.chain._MAX_DENSE", 10)
    with pytest.raises(CurvatureError, match="expected at most 10 parameters for a dense matrix"):
        matrix.solve(e.gradient(), 0.1)
    assert np.all(np.isfinite(flat(matrix.matvec(e.gradient()))))


def test_undamped_singular_matrix_has_no_inverse(backend: Backend):
    """Softmax outputs: G of the last layer has the null vector of ones."""
    e = batch(backend, REGULAR, SoftmaxCrossEntropy(), (60, 2))
    matrix = CURVATURE.matrix(estimate(CURVATURE, e), e.params)
    with pytest.raises(FactorizationError, match="numerically singular"):
        matrix.solve(e.gradient())
