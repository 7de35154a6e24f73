"""Diagnostics against whole matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cases import NETWORKS, NetworkCase, networks
from curvature_cases import CURVATURES, dense, estimate, layer_slices, supported
from numerics import flat, host

from kfac_np import trees
from kfac_np.backend import Backend, Rng, get_backend
from kfac_np.curvature import (
    BlockDiagonal,
    BlockTridiagonal,
    DiagonalBlock,
    FullMatrix,
    KFACBlock,
    no_pi,
    pi_trace,
    quality,
)
from kfac_np.curvature.analysis.quality import effective_rank
from kfac_np.errors import InputError
from kfac_np.fisher import Exact, MonteCarlo
from kfac_np.layers import Dense, ReLU, Sequential
from kfac_np.losses import SquaredError
from kfac_np.objective import Objective

DENSE = [c for c in NETWORKS if "conv" not in c.name and c.terms == c.shape[0]]


def compared(ours: np.ndarray, exact: np.ndarray, vectors: np.ndarray) -> tuple[float, float]:
    """Cosine and relative error of two matrices' products with the same columns."""
    a, b = ours @ vectors, exact @ vectors
    cosine = np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b))
    return cosine, np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("name", ["kfac", "diagonal", "exact blocks", "full", "tridiagonal"])
@pytest.mark.parametrize(
    "case",
    networks(name="relu_softmax")
    + networks(name="weighted_softmax")
    + networks(name="dense_alone")
    + networks(name="positions_mixed_softmax"),
    ids=str,
)
def test_products_of_whole_matrices(backend: Backend, case: NetworkCase, name: str):
    e, curvature = case.build(backend).evaluate(), CURVATURES[name].curvature
    vectors = [case.tangent(backend, key) for key in range(3)]
    found = quality(e, curvature, vectors=vectors)
    columns = np.stack([flat(trees.ravel(v)) for v in vectors], axis=1)
    ours, exact = dense(curvature, e), dense(FullMatrix(), e)
    assert (found.cosine, found.relative_error) == pytest.approx(
        compared(ours, exact, columns), rel=1e-9, abs=1e-9
    )
    slices = dict(layer_slices(e.params))
    assert [q.path for q in found.layers] == list(slices)
    for q in found.layers:
        s = slices[q.path]
        assert q.parameters == s.stop - s.start
        assert (q.cosine, q.relative_error) == pytest.approx(
            compared(ours[s, s], exact[s, s], columns[s]), rel=1e-9, abs=1e-9
        )


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_what_is_exact_has_no_error(backend: Backend, case: NetworkCase):
    e = case.build(backend).evaluate()
    found = quality(e, FullMatrix(), draws=2)
    assert found.relative_error is not None
    assert found.relative_error <= 1e-13
    assert found.cosine == pytest.approx(1.0, abs=1e-14)
    blocks = quality(e, CURVATURES["exact blocks"].curvature, draws=2)
    assert max(q.relative_error for q in blocks.layers) <= 1e-13
    kfac = quality(e, BlockDiagonal(), draws=2)
    worst = max(q.relative_error for q in kfac.layers)
    assert (worst <= 1e-13) == ("expand" in case.kfac_exact)


def test_random_vectors_estimate_frobenius_norms():
    backend = get_backend("numpy", "float64")  # many draws; that backends agree is said above
    case = networks(name="relu_softmax")[0]
    e = case.build(backend).evaluate()
    found = quality(e, BlockDiagonal(), draws=400, rng=Rng(1))
    ours, exact = dense(BlockDiagonal(), e), dense(FullMatrix(), e)
    error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
    cosine = np.sum(ours * exact) / (np.linalg.norm(ours) * np.linalg.norm(exact))
    assert found.relative_error == pytest.approx(error, rel=0.1)
    assert found.cosine == pytest.approx(cosine, rel=0.1)


def test_condition_pi_and_effective_rank(backend: Backend):
    e = networks(name="logistic_sigmoid")[0].build(backend).evaluate()
    for curvature in (BlockDiagonal(), BlockTridiagonal()):
        moments = estimate(curvature, e)
        for q in quality(e, curvature, moments=moments, draws=1).layers:
            A, G = host(moments[q.path]["A"]), host(moments[q.path]["G"])
            a, g = np.linalg.eigvalsh(A), np.linalg.eigvalsh(G)
            assert q.condition_a == pytest.approx(np.linalg.cond(A), rel=1e-6)
            assert q.condition_g == (
                pytest.approx(np.linalg.cond(G), rel=1e-6) if g[0] > 1e-15 else math.inf
            )
            assert q.pi == pytest.approx(
                np.sqrt(np.trace(A) / len(A)) / np.sqrt(np.trace(G) / len(G))
            )
            for rank, values in ((q.rank_a, a), (q.rank_g, g)):
                p = np.clip(values, 1e-300, None) / np.sum(values)
                assert rank == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-9)
                assert 1 <= rank <= len(values)
            product = np.kron(np.clip(g, 1e-300, None), np.clip(a, 1e-300, None))
            p = product / product.sum()
            assert q.rank_a * q.rank_g == pytest.approx(np.exp(-np.sum(p * np.log(p))), rel=1e-9)


def test_pi_is_that_of_the_rule(backend: Backend):
    e = networks(name="tanh_squared")[0].build(backend).evaluate()
    for rule in (no_pi, pi_trace):
        curvature = BlockDiagonal(KFACBlock(rule=rule))
        moments = estimate(curvature, e)
        for q in quality(e, curvature, moments=moments, draws=1).layers:
            a, g = (float(x) for x in rule(moments[q.path]["A"], moments[q.path]["G"], 0.3))
            assert q.pi == pytest.approx(math.sqrt(a / g))


def test_what_does_not_apply_is_none(backend: Backend):
    e = networks(name="tanh_squared")[0].build(backend).evaluate()
    for curvature in (BlockDiagonal(DiagonalBlock()), FullMatrix()):
        for q in quality(e, curvature, draws=1).layers:
            numbers = (q.condition_a, q.condition_g, q.pi, q.rank_a, q.rank_g)
            assert numbers == (None,) * 5
            assert q.cosine is not None


def test_dead_layers(backend: Backend):
    """A layer whose derivatives vanish: 0/0 is None, singular is inf, a rank of nothing 0."""
    network = Sequential(Dense(2, 3), ReLU(), Dense(3, 1))
    params = (-100.0 * backend.ones((3, 3)), (), backend.ones((1, 4)))
    x = backend.asarray(np.random.default_rng(0).random((10, 2)))
    e = Objective(network, SquaredError()).evaluate(params, x, x[:, :1])
    first, last = quality(e, BlockDiagonal(), draws=2).layers
    assert (first.cosine, first.relative_error) == (None, None)
    assert first.condition_g == math.inf
    assert first.rank_g == 0.0
    assert last.condition_a == math.inf
    assert last.rank_a == pytest.approx(1.0)
    assert last.relative_error == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("n", [1, 3, 10])
def test_effective_rank_between_one_and_all(backend: Backend, n: int):
    values = np.linspace(1.0, 2.0, n)
    assert effective_rank(backend.asarray(np.ones(n))) == pytest.approx(n)
    assert effective_rank(backend.asarray(np.eye(n)[0])) == pytest.approx(1.0)
    rank = effective_rank(backend.asarray(values))
    assert rank == pytest.approx(effective_rank(backend.asarray(7.0 * values)))
    assert rank < n or n == 1
    assert effective_rank(backend.asarray(np.append(values, -1e-18))) == pytest.approx(rank)


def test_grouped_and_sampled_moments_are_compared_too(backend: Backend):
    """Every curvature of the table with one network of every kind it supports."""
    for case in NETWORKS[::7]:
        e = case.build(backend).evaluate()
        for name in ("kfac", "tridiagonal"):
            if supported(CURVATURES[name], case):
                found = quality(e, CURVATURES[name].curvature, draws=1, fisher=MonteCarlo(2))
                assert found.relative_error is None or found.relative_error >= 0


def test_as_a_table(backend: Backend):
    e = networks(name="tanh_squared")[0].build(backend).evaluate()
    found = quality(e, BlockDiagonal())
    lines = str(found).splitlines()
    assert lines[0].split() == (
        ["path", "parameters", "cosine", "error", "cond", "A", "cond", "G", "pi"]
        + ["rank", "A", "rank", "G"]
    )
    assert [line.split()[0] for line in lines[1:]] == ["0", "2", "total"]
    assert lines[1].split()[1] == "16"
    assert lines[-1].split() == [
        "total",
        "26",
        f"{found.cosine:.3g}",
        f"{found.relative_error:.3g}",
    ]


def test_no_vectors_are_refused(backend: Backend):
    e = networks(name="tanh_squared")[0].build(backend).evaluate()
    for options in ({"vectors": []}, {"draws": 0}):
        with pytest.raises(InputError, match="quality: expected at least one vector, got none"):
            quality(e, BlockDiagonal(), **options)


def test_the_same_again(backend: Backend):
    e = networks(name="tanh_squared")[0].build(backend).evaluate()
    assert quality(e, BlockDiagonal(), fisher=Exact()) == quality(e, BlockDiagonal())
    assert quality(e, BlockDiagonal(), rng=Rng(1)) != quality(e, BlockDiagonal())
