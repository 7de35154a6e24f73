"""Exact blocks, the full matrix and the diagonal against automatic differentiation."""

from __future__ import annotations

import autograd
import numpy as np
import pytest
from cases import NETWORKS, NetworkCase, Problem, networks
from curvature_cases import (
    CURVATURES,
    FISHERS,
    dense,
    diagonal_blocks,
    estimate,
    in_units,
    layer_slices,
    supported,
)
from numerics import assert_close, flat, host, numbers
from references.dense import dense as reference_of
from references.losses import term

from kfac_np import trees
from kfac_np.backend import Array, Backend, Rng, get_backend
from kfac_np.curvature import (
    BlockDiagonal,
    DiagonalBlock,
    ExactBlock,
    FullMatrix,
    KFACBlock,
    expand,
)
from kfac_np.errors import CurvatureError
from kfac_np.fisher import Exact, InputOnly, MonteCarlo
from kfac_np.statistics import AffineStatistics, Scale

BLOCKS, DIAGONAL = BlockDiagonal(ExactBlock()), BlockDiagonal(DiagonalBlock())
SAMPLES = 2  # of FISHERS["monte carlo"]


def expected_fisher(case: NetworkCase, problem: Problem, fisher: str) -> np.ndarray:
    """The full matrix, parameters in the order of `trees.ravel`."""
    reference = reference_of(case)
    if fisher == "exact":
        return reference.fisher
    if fisher == "empirical":
        return reference.empirical
    return monte_carlo(case, problem)


def monte_carlo(case: NetworkCase, problem: Problem) -> np.ndarray:
    """(1/M) Σ_n (1/K) Σ_k u uᵀ, u = √w_n Σ_s J_nsᵀ ∇ℓ(z_ns, t̃_nsk), with the targets drawn there.

    Samples of one example's positions are independent of zero mean, so that the squares of their
    sums are unbiased: positions are backpropagated together. Where examples are coupled, so are
    they, and the whole batch is one n.
    """
    reference = reference_of(case)
    alone = 1 if case.coupled else case.shape[0]
    z = problem.objective.network.forward(problem.params, problem.x)[0]
    total = 0.0
    for k in range(SAMPLES):
        drawn = host(case.loss.sample_targets(Rng(0).child(k), z))
        drawn = drawn.reshape(reference.terms, *drawn.shape[z.ndim - 1 :])
        loss = autograd.grad(lambda zm, tm: term(case.loss, zm, tm))
        g = [loss(zm, tm) for zm, tm in zip(reference.outputs, drawn, strict=True)]
        u = np.einsum("m,mcp,mc->mp", reference.weights**0.5, reference.jacobians, np.stack(g))
        u = u.reshape(alone, -1, u.shape[-1]).sum(1)
        total = total + u.T @ u / SAMPLES
    return total / reference.terms


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_full_matrix_blocks_and_diagonal(backend: Backend, case: NetworkCase, fisher: str):
    problem = case.build(backend)
    e = problem.evaluate()
    expected = expected_fisher(case, problem, fisher)
    assert_close(dense(FullMatrix(), e, FISHERS[fisher]), expected)
    blocks = diagonal_blocks(expected, e.params)
    assert_close(dense(BLOCKS, e, FISHERS[fisher]), blocks)
    assert_close(dense(DIAGONAL, e, FISHERS[fisher]), np.diag(np.diag(expected)))


@pytest.mark.parametrize("name", CURVATURES)
def test_traces_of_blocks(backend: Backend, name: str):
    """Those of the matrix written out, layer by layer; none where it has no blocks."""
    e = networks(name="tanh_squared")[0].build(backend).evaluate()
    curvature = CURVATURES[name].curvature
    found = curvature.block_traces(estimate(curvature, e), e.params)
    if name == "full":
        assert found == {}
        return
    diagonal = np.diag(dense(curvature, e))
    expected = {path: diagonal[s].sum() for path, s in layer_slices(e.params)}
    assert {path: float(x) for path, x in found.items()} == pytest.approx(expected, rel=1e-9)


IN_UNITS = (
    *("deep_linear_no_bias", "mean_pooled", "conv_geometries_sigmoid", "embedding_flattened"),
    *("layer_norm_softmax", "rms_norm_positions", "tied_softmax"),
)


@pytest.mark.parametrize("case", [c for c in NETWORKS if c.name in IN_UNITS], ids=str)
def test_matrices_and_traces_in_units(backend: Backend, case: NetworkCase):
    """diag(u) F diag(u) for any u that has the form of the units; parameters without stay as F is.

    EKFAC, which is another matrix in other units, is so in those that its basis was made in.
    """
    e, rng = case.build(backend).evaluate(), np.random.default_rng(8)
    for name, found in CURVATURES.items():
        if not supported(found, case):
            continue
        curvature, measured = found.curvature, name.startswith("ekfac")
        moments = curvature.estimate(e, Exact(), Rng(0), in_own_units=measured)
        own = curvature.units(moments, e.params)
        assert set(own) == {path for path, _ in trees.items(e.params)}
        assert all(np.all(host(x) > 0.0) for u in own.values() for x in u)
        drawn = {
            path: tuple(backend.asarray(10.0 ** rng.uniform(-1, 1, x.shape)) for x in u)
            for path, u in own.items()
        }
        matrix = host(curvature.matrix(moments, e.params).to_dense())
        for left_out in ([], list(own)[:1], list(own)[1:]):
            units = {path: u for path, u in drawn.items() if path not in left_out}
            if measured:
                units = {path: own[path] for path in units}
            if name == "full" and 0 < len(units) < len(own):  # it does not know whose rows they are
                with pytest.raises(CurvatureError, match="those of all"):
                    curvature.in_units(moments, units)
                continue
            rows = flat(in_units(units, trees.tree_map(lambda p: p * 0.0 + 1.0, e.params)))
            expected = rows[:, None] * matrix * rows[None, :]
            relative = curvature.in_units(moments, units)
            assert_close(curvature.matrix(relative, e.params).to_dense(), expected)
            traces = {path: np.trace(expected[s, s]) for path, s in layer_slices(e.params)}
            traces = {} if name == "full" else traces
            of_blocks = curvature.block_traces(moments, e.params, units)
            assert numbers(of_blocks) == pytest.approx(traces, rel=1e-12)


@pytest.mark.parametrize("name", CURVATURES)
def test_a_batch_that_counts_for_less(backend: Backend, name: str):
    """w new + (1 - w) old, w on the host or the device, but for a basis that is not the same."""
    e = networks(name="tanh_squared")[0].build(backend).evaluate()
    curvature = CURVATURES[name].curvature
    old, new = (estimate(curvature, e, MonteCarlo(1), seed) for seed in range(2))
    paths = list(new)
    for w in (0.25, backend.asarray(0.25)):
        found = curvature.weighted(old, new, {paths[0]: w})
        assert list(found) == paths
        for path in paths:
            counts = 0.25 if path == paths[0] and not name.startswith("ekfac") else 1.0
            for key, x in found[path].items():
                mean = counts * host(new[path][key]) + (1 - counts) * host(old[path][key])
                assert_close(x, mean, 1e-15)


@pytest.mark.parametrize("case", NETWORKS[::3], ids=str)
def test_diagonals(backend: Backend, case: NetworkCase):
    """Those of the matrix written out, of every curvature, in the shapes of the parameters."""
    e = case.build(backend).evaluate()
    for found in CURVATURES.values():
        if supported(found, case):
            moments = estimate(found.curvature, e)
            diagonal = found.curvature.diagonal(moments, e.params)
            shapes = trees.tree_map(lambda p, d: p.shape == d.shape, e.params, diagonal)
            assert all(trees.leaves(shapes))
            matrix = host(found.curvature.matrix(moments, e.params).to_dense())
            assert_close(trees.ravel(diagonal), np.diag(matrix))


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_all_columns_at_once_or_one_at_a_time(backend: Backend, case: NetworkCase):
    """A budget of one byte backpropagates one column at a time: the moments are the same sums."""
    e = case.build(backend).evaluate()
    together = case.terms if case.coupled else case.terms // case.shape[0]
    vectors = list(Exact(budget_bytes=1).vectors(e, Rng(0)))
    assert len(vectors) == case.output_shape[-1] * together
    for name in ("kfac", "kfac reduce", "diagonal", "exact blocks", "full", "tridiagonal"):
        if supported(CURVATURES[name], case):
            whole = estimate(CURVATURES[name].curvature, e, Exact())
            chunks = estimate(CURVATURES[name].curvature, e, Exact(budget_bytes=1))
            assert_close(trees.ravel(chunks), trees.ravel(whole), 1e-14)


def test_inputs_are_formed_once_however_many_chunks(backend: Backend):
    calls = []

    def counting(s: AffineStatistics, scale: Scale) -> tuple[Array, Array]:
        calls.append(s.num_vectors)
        return expand(s, scale)

    e = networks(name="dense_alone")[0].build(backend).evaluate()
    estimate(BlockDiagonal(KFACBlock(sharing=counting)), e, Exact(budget_bytes=1))
    assert calls == [0, 1, 1], "once for A (no vectors), once for each of two columns"


@pytest.mark.parametrize(
    "name",
    [
        "tanh_squared",
        "relu_softmax",
        "logistic_sigmoid",
        "gelu_poisson",
        "positions_mixed_softmax",
        "layer_norm_softmax",
        "batch_norm_softmax",
        "batch_norm_positions",
        "embedding_flattened",
    ],
)
@pytest.mark.parametrize("kind", ["full", "diagonal", "kfac"])
def test_monte_carlo_is_unbiased(name: str, kind: str):
    """The mean of n estimates is normal around the exact Fisher, of the estimates' own deviation.

    Five standard deviations; on NumPy alone, since targets are drawn on the host: that backends
    agree is another law's business.
    """
    e = networks(name=name)[0].build(get_backend("numpy", "float64")).evaluate()
    curvature, n = CURVATURES[kind].curvature, 300
    exact = np.asarray(trees.ravel(estimate(curvature, e, Exact())))
    draws = [trees.ravel(estimate(curvature, e, MonteCarlo(1), seed)) for seed in range(n)]
    sigma = np.std(draws, axis=0) / np.sqrt(n)
    assert np.all(np.abs(np.mean(draws, axis=0) - exact) <= 5 * sigma + 1e-12)
    # Enough draws to tell: the deviation allowed is a fraction of the whole.
    assert 5 * np.linalg.norm(sigma) < 0.7 * np.linalg.norm(exact)


@pytest.mark.parametrize("case", networks(weighted=False), ids=str)
def test_input_only_gives_kfac_with_g_the_identity(backend: Backend, case: NetworkCase):
    e = case.build(backend).evaluate()
    curvature = BlockDiagonal()
    moments, exact = estimate(curvature, e, InputOnly()), estimate(curvature, e, Exact())
    for path, p in trees.items(e.params):
        if "G" not in moments[path]:  # scale and shift, g = 1: (x̂, 1) is what is squared
            found = dict(trees.items(e.backward(e.output_gradient())))[path]
            x = host(found.x).reshape(-1, p.shape[1])
            seen = np.stack([x, np.ones_like(x)])[: p.shape[0]]
            expected = np.einsum("irc,jrc->cij", seen, seen) / len(x)
            assert_close(moments[path]["units"], expected)
            continue
        identity = np.broadcast_to(np.eye(p.shape[-2]), (*p.shape[:-2], p.shape[-2], p.shape[-2]))
        np.testing.assert_array_equal(host(moments[path]["G"]), identity)
        np.testing.assert_array_equal(host(moments[path]["A"]), host(exact[path]["A"]))


@pytest.mark.parametrize("kind", ["diagonal", "exact blocks", "full"])
def test_input_only_is_refused_by_all_others(backend: Backend, kind: str):
    e = networks(name="tanh_squared")[0].build(backend).evaluate()
    match = "layer 0: .*expected a Fisher type with vectors, got InputOnly"
    with pytest.raises(CurvatureError, match=match):
        estimate(CURVATURES[kind].curvature, e, InputOnly())


@pytest.mark.parametrize(
    "case", [c for c in NETWORKS if c.terms > c.shape[0] and not c.classes], ids=str
)
def test_reduce_is_refused_for_a_loss_at_every_position(backend: Backend, case: NetworkCase):
    e = case.build(backend).evaluate()
    terms = case.terms // case.shape[0]
    match = rf"layer 0[.\w]*: reduce: expected one loss term an example, got {terms}; .* use expand"
    for fisher in (*FISHERS.values(), InputOnly()):
        with pytest.raises(CurvatureError, match=match):
            estimate(CURVATURES["kfac reduce"].curvature, e, fisher)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            "batch_norm_softmax",
            "expected examples that do not influence each other",
        ),
        (
            "embedding_flattened",
            "expected sharing by expand for an embedding used at 2",
        ),
    ],
)
def test_reduce_is_refused_where_it_is_not_defined(backend: Backend, name: str, match: str):
    e = networks(name=name)[0].build(backend).evaluate()
    for fisher in (*FISHERS.values(), InputOnly()):
        with pytest.raises(CurvatureError, match=f"layer 0: .*{match}"):
            estimate(CURVATURES["kfac reduce"].curvature, e, fisher)


def test_a_full_matrix_too_large_is_refused_before_it_is_formed(backend: Backend):
    e = networks(name="tanh_squared")[0].build(backend).evaluate()
    with pytest.raises(CurvatureError, match="expected at most 25 parameters, got 26"):
        estimate(FullMatrix(max_parameters=25), e)
    assert dense(FullMatrix(max_parameters=26), e).shape == (26, 26)
