"""Where products between layers are exact, and the inverse of a difference of two of them."""

from __future__ import annotations

import numpy as np
import pytest
from cases import networks
from curvature_cases import FISHERS, estimate
from hypothesis import given
from hypothesis import strategies as st
from numerics import EPS, assert_close, host
from tridiagonal_problems import REGULAR, batch

from kfac_np import trees
from kfac_np.backend import Backend
from kfac_np.curvature import (
    BlockTridiagonal,
    FullKronecker,
    FullMatrix,
    KFACBlock,
    reduce,
)
from kfac_np.layers import Dense, Sequential
from kfac_np.losses import (
    Loss,
    PoissonLogRate,
    SigmoidCrossEntropy,
    SoftmaxCrossEntropy,
    SquaredError,
)
from kfac_np.matrices import difference_inverse

FULL = FullKronecker()


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
    """g does not depend on the example: F̃ is the exact Fisher, every block of it, and so is F̂.

    For ā_{i+1} is a linear map of ā_i, and g_i of g_{i+1}: neighbours determine what is beyond.
    A layer with a bias after one without has a constant that no earlier layer knows.
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
    used = biases[: len(widths) - 1]
    if used != sorted(used, reverse=True):
        return
    tridiagonal = BlockTridiagonal()
    found = tridiagonal.matrix(estimate(tridiagonal, e), e.params).to_dense()
    assert_close(found, exact, 1e-8)  # whatever condition the draws have


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
