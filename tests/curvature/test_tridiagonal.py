"""What the block-tridiagonal inverse is: laws of whole matrices, on every backend."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from cases import NetworkCase, networks, real_targets
from curvature_cases import FISHERS, estimate
from hypothesis import given
from hypothesis import strategies as st
from numerics import EPS, assert_close, flat, frobenius_distance, host
from tridiagonal_dense import factors_of

from kfac_np import trees
from kfac_np.backend import Backend, Rng
from kfac_np.curvature import (
    BlockDiagonal,
    BlockTridiagonal,
    FullKronecker,
    FullMatrix,
    KFACBlock,
    reduce,
)
from kfac_np.errors import CurvatureError, FactorizationError
from kfac_np.fisher import Empirical, Exact, FisherType, InputOnly, MonteCarlo
from kfac_np.layers import Dense, Layer, LeakyReLU, Sequential, Tanh
from kfac_np.losses import (
    Loss,
    PoissonLogRate,
    SigmoidCrossEntropy,
    SoftmaxCrossEntropy,
    SquaredError,
)
from kfac_np.matrices import difference_inverse
from kfac_np.objective import Evaluation, Objective
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
REGULAR = Sequential(
    Dense(2, 3),
    Tanh(),
    Dense(3, 2, bias=False),
    Sequential(LeakyReLU(0.3), Sequential(Dense(2, 3), Tanh())),
    Dense(3, 2),
)


def regular(backend: Backend, positions: tuple[int, ...] = ()) -> Evaluation:
    """So many examples, and so large weights, that every factor has an inverse."""
    rng = np.random.default_rng(11)
    params = trees.tree_map(
        lambda p: backend.asarray(1.5 * rng.standard_normal(p.shape)), REGULAR.init(Rng(0), backend)
    )
    x, t = (backend.asarray(1.5 * rng.standard_normal((60, *positions, 2))) for _ in range(2))
    return Objective(REGULAR, SquaredError()).evaluate(params, x, t)


def batch(
    backend: Backend, network: Layer, loss: Loss, shape: tuple[int, ...], weighted: bool = False
) -> Evaluation:
    """An evaluation at random parameters, biases too, with targets sampled from the model."""
    rng = np.random.default_rng(7)
    start = network.init(Rng(0), backend)
    params = trees.tree_map(
        lambda p: backend.asarray(rng.standard_normal(p.shape) / np.sqrt(p.shape[-1])), start
    )
    x = backend.asarray(rng.standard_normal(shape))
    z, _ = network.forward(params, x)
    t = loss.sample_targets(Rng(1), z)
    if isinstance(loss, SquaredError):
        t = backend.asarray(real_targets(np.random.default_rng(8), tuple(z.shape)))
    w = backend.asarray(rng.uniform(0.3, 2.0, shape[0])) if weighted else None
    return Objective(network, loss).evaluate(params, x, t, w)


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


# ------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize(
    "loss",
    [SquaredError(), SigmoidCrossEntropy(), SoftmaxCrossEntropy(), PoissonLogRate()],
    ids=lambda loss: type(loss).__name__,
)
def test_one_example_without_sharing(backend: Backend, loss: Loss):
    """E over one example is a product, between layers too: F̃ is the Fisher matrix itself."""
    e = batch(backend, REGULAR, loss, (1, 2))
    for fisher in FISHERS.values():
        exact = FullMatrix().matrix(estimate(FullMatrix(), e, fisher), e.params).to_dense()
        found = FULL.matrix(estimate(FULL, e, fisher), e.params).to_dense()
        assert_close(found, exact, 1e-13)


@given(data=st.data())
def test_deep_linear_network_with_squared_error(backend: Backend, data: st.DataObject):
    """g does not depend on the example: F̃ is the exact Fisher, every block of it.

    F̂ agrees with it on the neighbours, and as they determine what is beyond, elsewhere, too:
    a_i is a linear map of a_{i-1}, and so is g_i of g_{i+1}.
    """
    widths = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=5))
    biases = data.draw(st.lists(st.booleans(), min_size=4, max_size=4))
    positions = data.draw(st.sampled_from([(), (3,)]))
    steps = zip(widths[:-1], widths[1:], biases[: len(widths) - 1], strict=True)
    network = Sequential(*(Dense(i, o, bias=bias) for i, o, bias in steps))
    n = data.draw(st.integers(1, 6))
    e = batch(backend, network, SquaredError(), (n, *positions, widths[0]))
    exact = FullMatrix().matrix(estimate(FullMatrix(), e), e.params).to_dense()
    assert_close(FULL.matrix(estimate(FULL, e), e.params).to_dense(), exact, 1e-13)


def test_reduce_couples_layers_of_any_number_of_locations(backend: Backend):
    """A deep linear network with mean pooling, where reduced factors are exact."""
    case = networks(name="mean_pooled_linear")[0]
    e = case.build(backend).evaluate()
    full = FullKronecker(KFACBlock(sharing=reduce))
    exact = FullMatrix().matrix(estimate(FullMatrix(), e), e.params).to_dense()
    assert_close(full.matrix(estimate(full, e), e.params).to_dense(), exact, 1e-13)
    curvature = BlockTridiagonal(KFACBlock(sharing=reduce))
    matrix = host(curvature.matrix(estimate(curvature, e), e.params).to_dense())
    sizes = [int(np.prod(p.shape)) for p in trees.leaves(e.params)]
    cut = sizes[0]
    assert_close(matrix[:cut, : cut + sizes[1]], host(exact)[:cut, : cut + sizes[1]])
    assert_close(matrix[cut:, cut:], host(exact)[cut:, cut:])


# --------------------------------------------------------- inverse of a difference of products


def positive_definite(rng: np.random.Generator, n: int, log_condition: float) -> np.ndarray:
    u = np.linalg.qr(rng.standard_normal((n, n)))[0]
    m = (u * np.geomspace(1.0, 10.0**-log_condition, n)) @ u.T
    return rng.uniform(0.1, 10.0) * 0.5 * (m + m.T)


@given(data=st.data())
def test_inverse_of_a_difference_of_kronecker_products(backend: Backend, data: st.DataObject):
    """G ⊗ A - S ⊗ R for R ≤ A, S ≤ G, to what their conditions leave of the digits."""
    n, m = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    shrink = data.draw(st.floats(0.0, 0.99))
    factors, crosses = [], []
    for size in (n, m):
        joint = positive_definite(rng, 2 * size, data.draw(st.floats(0.0, 3.0)))
        p, c = joint[:size, :size], joint[:size, size:]
        half = np.linalg.inv(np.linalg.cholesky(joint[size:, size:]))
        factors.append(p)
        crosses.append(shrink * c @ half.T)  # c q⁻¹ cᵀ ≤ p
    (a, g), (x, y) = factors, crosses
    k_a, k_g, gaps = (
        host(found)
        for found in difference_inverse(
            *(backend.asarray(np.linalg.cholesky(np.linalg.inv(p))) for p in (a, g)),
            *(backend.asarray(cross) for cross in (x, y)),
        )
    )
    difference = np.kron(g, a) - np.kron(y @ y.T, x @ x.T)
    k = np.kron(k_g, k_a)
    assert np.all(gaps > 0)
    condition = np.linalg.cond(difference) * max(np.linalg.cond(a), np.linalg.cond(g))
    found = (k / gaps.reshape(-1)) @ k.T
    assert_close(found, np.linalg.inv(difference), 100 * EPS * condition)


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
