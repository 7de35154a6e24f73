"""Scale: what is summed, what averaged, and what a weight means. The commonest bug of all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import NETWORKS, NetworkCase, networks, to_backend
from curvature_cases import CURVATURES, dense, estimate, supported
from numerics import assert_close, flat, host, relative_error
from references.dense import dense as reference_of

from kfac_np import trees
from kfac_np.backend import Backend
from kfac_np.curvature import BlockTridiagonal, Curvature, FullMatrix
from kfac_np.fisher import Empirical, Exact, InputOnly
from kfac_np.objective import Evaluation, Objective
from kfac_np.statistics import ElementwiseStatistics, EmbeddingStatistics, GroupedStatistics

HostArray = np.ndarray[Any, Any]
KINDS = ("kfac", "kfac reduce", "diagonal", "exact blocks", "full", "tridiagonal")
BOTH = (Exact(), Empirical())


def evaluate(
    backend: Backend,
    case: NetworkCase,
    rows: HostArray | None = None,
    weights: HostArray | None = None,
) -> Evaluation:
    """The case on the given rows of its batch, with the given weights in place of its own."""
    params, x, t, own = case.host()
    if rows is not None:
        x, t, own = x[rows], t[rows], None if own is None else own[rows]
    w = own if weights is None else weights
    return Objective(case.network, case.loss).evaluate(
        to_backend(backend, params),
        backend.asarray(x),
        backend.asarray(t),
        None if w is None else backend.asarray(np.asarray(w, dtype=float)),
    )


def kinds(case: NetworkCase) -> list[Curvature]:
    return [CURVATURES[k].curvature for k in KINDS if supported(CURVATURES[k], case)]


def kinds_of_batches(case: NetworkCase) -> list[Curvature]:
    """Those that see a batch whose examples are coupled as a whole: K-FAC takes its rows apart."""
    if not case.coupled:
        return kinds(case)
    return [CURVATURES[k].curvature for k in ("diagonal", "exact blocks", "full")]


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_a_batch_twice_over_is_the_batch(backend: Backend, case: NetworkCase):
    once = evaluate(backend, case)
    twice = evaluate(backend, case, np.tile(np.arange(case.shape[0]), 2))
    for curvature in kinds_of_batches(case):
        for fisher in BOTH:
            a, b = estimate(curvature, once, fisher), estimate(curvature, twice, fisher)
            assert_close(trees.ravel(b), trees.ravel(a))


@pytest.mark.parametrize("case", networks(coupled=True), ids=str)
def test_kfac_of_coupled_examples_depends_on_how_many_there_are(
    backend: Backend, case: NetworkCase
):
    """Twice over, half of what an example does to others it does to copies of them.

    The square of a sum does not notice, the sum of squares over rows does.
    """
    curvature = CURVATURES["kfac"].curvature
    once = evaluate(backend, case)
    twice = evaluate(backend, case, np.tile(np.arange(case.shape[0]), 2))
    assert relative_error(dense(curvature, twice), dense(curvature, once)) > 1e-3


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_the_order_of_examples_does_not_matter(backend: Backend, case: NetworkCase):
    rows = np.random.default_rng(0).permutation(case.shape[0])
    for curvature in kinds(case):
        assert_close(
            dense(curvature, evaluate(backend, case, rows)),
            dense(curvature, evaluate(backend, case)),
        )


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_weights_multiply_terms_and_nothing_else(backend: Backend, case: NetworkCase):
    """(1/M) Σ_n w_n J_nᵀ B_n J_n at other weights: batch statistics do not notice them."""
    n, reference = case.shape[0], reference_of(case)
    weights = np.resize([2.0, 0.0, 0.5], n)
    e = evaluate(backend, case, weights=weights)
    w, j = np.repeat(weights, reference.terms // n), reference.jacobians
    g = reference.output_gradients
    for fisher, inner in (
        (Exact(), reference.output_hessians),
        (Empirical(), g[:, :, None] * g[:, None, :]),
    ):
        expected = np.einsum("m,mcp,mcd,mdq->pq", w, j, inner, j, optimize=True) / len(w)
        assert_close(dense(FullMatrix(), e, fisher), expected)


@pytest.mark.parametrize("case", networks(weighted=False, coupled=False), ids=str)
def test_a_weight_is_a_repetition_up_to_the_number_of_terms(backend: Backend, case: NetworkCase):
    """Weights 2, 0, 1, ... : C · N is that of a batch with the examples so many times."""
    n = case.shape[0]
    counts = np.resize([2, 0, 1, 3], n)
    weighted = evaluate(backend, case, weights=counts)
    repeated = evaluate(backend, case, np.repeat(np.arange(n), counts))
    for curvature in kinds(case):
        for fisher in BOTH:
            expected = counts.sum() / n * dense(curvature, repeated, fisher)
            # regressions between layers lose what the condition of a factor says, some 1e4 here
            tolerance = 1e-11 if isinstance(curvature, BlockTridiagonal) else 1e-12
            assert_close(dense(curvature, weighted, fisher), expected, tolerance)


@pytest.mark.parametrize("case", networks(weighted=False), ids=str)
def test_a_common_weight_multiplies_loss_and_curvature(backend: Backend, case: NetworkCase):
    """Weights N make a sum of a mean: N times the gradient, N times the curvature."""
    n = case.shape[0]
    mean, total = evaluate(backend, case), evaluate(backend, case, weights=np.full(n, n))
    assert_close(flat(total.gradient()), n * flat(mean.gradient()))
    for curvature in kinds(case):
        for fisher in BOTH:
            assert_close(dense(curvature, total, fisher), n * dense(curvature, mean, fisher))


@pytest.mark.parametrize(
    "name", ["kfac", "kfac exactly damped", "exact blocks", "diagonal", "tridiagonal"]
)
def test_the_undamped_step_does_not_notice_the_scale_of_the_loss(backend: Backend, name: str):
    case, curvature = networks(name="logistic_sigmoid")[0], CURVATURES[name].curvature
    rows = np.random.default_rng(1).standard_normal((40, 4))
    t = (rows[:, [0, 1, 2, 0]] > 0).astype(float)
    params = to_backend(backend, case.host()[0])
    steps = []
    for weight in (1.0, 40.0):
        e = Objective(case.network, case.loss).evaluate(
            params, backend.asarray(rows), backend.asarray(t), weight * backend.ones((40,))
        )
        factors, events = curvature.factorise(estimate(curvature, e), 0.0)
        assert not events
        steps.append(flat(curvature.solve(factors, e.gradient())))
    # the blocks' condition is 1e5, that of all of them together 1e8
    assert_close(steps[1], steps[0], 1e-7 if name == "tridiagonal" else 1e-10)


@pytest.mark.parametrize(
    "case", [c for c in networks(weighted=False, coupled=False) if c.shape[0] % 2 == 0], ids=str
)
def test_moments_are_means_over_parts_of_the_batch(backend: Backend, case: NetworkCase):
    """So that mini-batches and devices can average them."""
    half = case.shape[0] // 2
    parts = [evaluate(backend, case, np.arange(half) + start) for start in (0, half)]
    whole = evaluate(backend, case)
    for curvature in kinds(case):
        for fisher in (*BOTH, InputOnly()) if curvature is CURVATURES["kfac"].curvature else BOTH:
            first, second = (estimate(curvature, e, fisher) for e in parts)
            mean = trees.scale(0.5, trees.axpy(1.0, first, second))
            assert_close(trees.ravel(mean), trees.ravel(estimate(curvature, whole, fisher)))


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_part_of_an_evaluation_is_the_evaluation_of_that_part(backend: Backend, case: NetworkCase):
    n = max(case.fewest, case.shape[0] // 2)
    part = evaluate(backend, case, np.arange(n))
    taken = evaluate(backend, case).take(n)
    for curvature in kinds(case):
        assert_close(dense(curvature, taken), dense(curvature, part))


@pytest.mark.parametrize("name", ["positions_linear", "positions_softmax"])
def test_positions_that_do_not_mix_are_examples(backend: Backend, name: str):
    """(N, S, d) with a loss at every position is (N · S, d): M = N · S in both."""
    case = networks(name=name)[0]
    params, x, t, _ = case.host()
    rows = case.shape[0] * case.shape[1]
    as_examples = Objective(case.network, case.loss).evaluate(
        to_backend(backend, params),
        backend.asarray(x.reshape(rows, -1)),
        backend.asarray(t.reshape(rows, *t.shape[2:])),
    )
    for curvature in kinds(case):
        for fisher in BOTH:
            shared = dense(curvature, evaluate(backend, case), fisher)
            assert_close(dense(curvature, as_examples, fisher), shared)


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_the_corner_of_a_factor_with_bias_is_one(backend: Backend, case: NetworkCase):
    """A is a mean: its homogeneous corner says so, with weights and positions too.

    So does the corner of each group of a grouped layer; that of an embedding's one-hot inputs is
    the sum of their frequencies.
    """
    e = evaluate(backend, case)
    moments = estimate(CURVATURES["kfac"].curvature, e)
    for path, s in trees.items(e.backward(e.output_gradient())):
        if isinstance(s, ElementwiseStatistics):
            assert "A" not in moments[path]  # no Kronecker product
            continue
        A = host(moments[path]["A"])
        if isinstance(s, EmbeddingStatistics):
            assert A.shape == (s.size,)
            assert np.sum(A) == pytest.approx(1.0, rel=1e-15)
            continue
        grouped = isinstance(s, GroupedStatistics)
        for group, a in zip(s.groups if grouped else [s], A if grouped else [A], strict=True):
            if np.all(host(group.a)[..., -1] == 1.0):  # the homogeneous coordinate
                assert a[-1, -1] == pytest.approx(1.0, rel=1e-15)
