"""Fisher types: the statistics that they backpropagate add up to the matrices that they name."""

from __future__ import annotations

import math

import numpy as np
import pytest
from cases import NETWORKS, NetworkCase, networks
from numerics import EPS, assert_close, flat
from references.dense import dense

from kfac_np import trees
from kfac_np.backend import Array, Backend, Rng, get_backend, to_numpy
from kfac_np.errors import InputError
from kfac_np.fisher import Empirical, Exact, FisherType, InputOnly, MonteCarlo
from kfac_np.objective import Evaluation
from kfac_np.statistics import (
    AffineStatistics,
    ElementwiseStatistics,
    EmbeddingStatistics,
    GroupedStatistics,
    Statistics,
)

HostArray = np.ndarray


def chunks(e: Evaluation, fisher: FisherType, rng: Rng) -> list[HostArray]:
    """Gradients of each chunk, shape (K, N, P), columns in the order of `ravel`.

    Where examples are coupled, the batch is one example: (K, 1, P).
    """
    found = []
    for statistics in fisher.statistics(e, rng):
        each = [
            to_numpy(s.gradient())[:, None] if e.scale.coupled else to_numpy(s.per_example())
            for s in trees.leaves(statistics)
        ]
        found.append(np.concatenate([u.reshape(*u.shape[:2], -1) for u in each], axis=-1))
    return found


def matrix(e: Evaluation, fisher: FisherType, rng: Rng | None = None) -> HostArray:
    """(1/M) Σ_{n,k} u u^T."""
    rows = np.concatenate([u.reshape(-1, u.shape[-1]) for u in chunks(e, fisher, rng or Rng(0))])
    return rows.T @ rows / e.scale.terms


@pytest.mark.parametrize("budget", [1, 10_000, 2**28])
@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_exact(case: NetworkCase, budget: int, backend: Backend):
    e = case.build(backend).evaluate()
    assert_close(matrix(e, Exact(budget_bytes=budget)), dense(case).fisher)


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_empirical(case: NetworkCase, backend: Backend):
    e = case.build(backend).evaluate()
    assert_close(matrix(e, Empirical()), dense(case).empirical)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_monte_carlo(case: NetworkCase, samples: int, backend: Backend):
    """(1/M) Σ_n (1/K) Σ_k u u^T, u = √w_n Σ_s J_ns^T ∂ℓ/∂z_ns at drawn targets.

    Where examples are coupled the sum is over them, too, and the batch is one n.
    """
    e, reference, rng = case.build(backend).evaluate(), dense(case), Rng(3)
    expected = 0.0
    for k in range(samples):
        drawn = case.loss.sample_targets(rng.child(k), e.outputs)
        g = reference.output_gradients_at(to_numpy(drawn))
        u = np.einsum("m,mcp,mc->mp", reference.weights**0.5, reference.jacobians, g)
        alone = 1 if case.coupled else case.shape[0]
        u = u.reshape(alone, -1, u.shape[-1]).sum(axis=1)
        expected = expected + u.T @ u / samples
    assert_close(matrix(e, MonteCarlo(samples), rng), expected / case.terms)


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in NETWORKS
        if c.name.startswith(("tanh", "weighted", "gelu", "positions_m", "batch_norm"))
    ],
    ids=str,
)
def test_monte_carlo_is_unbiased(case: NetworkCase):
    """Its mean is the exact Fisher, with a loss at every position too."""
    e = case.build(get_backend("numpy", "float64")).evaluate()
    draws = 1500
    values = np.stack(
        [
            np.einsum("knp,knq->pq", u, u) * (draws / e.scale.terms)
            for u in chunks(e, MonteCarlo(draws), Rng(5))
        ]
    )
    # Each entry is a mean of `draws` numbers: within 6 of its standard errors, which one entry in
    # 10⁹ would miss by chance; heavy tails of rare targets are what the 1/draws is for.
    exact = dense(case).fisher
    allowed = 6 * (values.std(axis=0) / draws**0.5 + np.abs(exact).max() / draws)
    assert np.all(np.abs(values.mean(axis=0) - exact) <= allowed)


def what_was_seen(s: Statistics) -> list[Array]:
    """The inputs that statistics hold: each group of a grouped layer has its own."""
    match s:
        case AffineStatistics():
            return [s.a]
        case GroupedStatistics():
            return [group.a for group in s.groups]
        case ElementwiseStatistics():
            return [s.x]
        case EmbeddingStatistics():
            return [s.indices]
    raise AssertionError(s)


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_input_only(case: NetworkCase, backend: Backend):
    e = case.build(backend).evaluate()
    (statistics,) = InputOnly().statistics(e, Rng(0))
    _, reference = e.objective.network.backward(e.params, e.cache, e.outputs)
    for s, full in zip(trees.leaves(statistics), trees.leaves(reference), strict=True):
        assert s.num_vectors == 0
        assert s.gradient().shape == (0, *s.parameter_shape)
        for a, b in zip(what_was_seen(s), what_was_seen(full), strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("case", NETWORKS, ids=str)
@pytest.mark.parametrize("budget", [1, 3_000, 20_000, 10**9])
def test_the_budget_bounds_a_backward_pass(case: NetworkCase, budget: int, backend: Backend):
    e = case.build(backend).evaluate()
    # As many vectors as an example has terms, or where examples are coupled the whole batch.
    together, columns = (
        case.terms if case.coupled else e.scale.positions,
        e.outputs.shape[-1],
    )
    one = (
        8
        * case.shape[0]
        * max(case.network.backward_size(case.shape[1:]), math.prod(case.output_shape[1:]))
    )
    counts = [v.shape[0] for v in Exact(budget_bytes=budget).vectors(e, Rng(0))]
    assert sum(counts) == together * columns
    assert max(counts) * one <= max(budget, one)
    if budget == 1:
        assert counts == [1] * (together * columns)
    if budget == 10**9:
        assert len(counts) == 1


def test_a_larger_budget_means_fewer_chunks(backend: Backend):
    e = next(c for c in NETWORKS if c.name == "positions_softmax").build(backend).evaluate()
    counts = [len(list(Exact(b).vectors(e, Rng(0)))) for b in (1, 2_000, 5_000, 10_000, 10**6)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 12
    assert counts[-1] == 1


@pytest.mark.parametrize("case", networks(weighted=True), ids=str)
def test_weights_enter_as_roots(case: NetworkCase, backend: Backend):
    """A weight multiplies an example's terms, and so its part of every Fisher, once."""
    problem = case.build(backend)
    plain = problem.objective.evaluate(problem.params, problem.x, problem.t)
    root = np.sqrt(to_numpy(problem.weights))
    root = root.reshape(1, -1, *[1] * (len(case.output_shape) - 1))
    for fisher in (Exact(), Exact(1), MonteCarlo(2), Empirical()):
        weighted, without = (fisher.vectors(e, Rng(1)) for e in (problem.evaluate(), plain))
        for u, v in zip(weighted, without, strict=True):
            assert_close(u, root * to_numpy(v))


@pytest.mark.parametrize("fisher", [Exact(), Exact(1), MonteCarlo(2), Empirical(), InputOnly()])
def test_vectors_have_the_outputs_place_and_shape(fisher: FisherType, backend: Backend):
    for case in NETWORKS:
        e = case.build(backend).evaluate()
        for v in fisher.vectors(e, Rng(0)):
            assert Backend.of(v) == backend
            assert tuple(v.shape[1:]) == case.output_shape


def test_monte_carlo_follows_its_stream(backend: Backend):
    e = NETWORKS[6].build(backend).evaluate()

    def draw(seed: int, samples: int = 4) -> HostArray:
        return np.concatenate([to_numpy(v) for v in MonteCarlo(samples).vectors(e, Rng(seed))])

    np.testing.assert_array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))
    # Samples are independent, and the first ones do not depend on how many follow.
    np.testing.assert_allclose(2 * draw(1)[:2], 2**0.5 * draw(1, 2), rtol=8 * EPS)
    assert not np.array_equal(draw(1)[0], draw(1)[1])


def test_gradients_at_the_training_targets(backend: Backend):
    """The empirical Fisher's vectors are those that the gradient is made of."""
    for case in networks(weighted=False):
        e = case.build(backend).evaluate()
        total = sum(u.sum(axis=(0, 1)) for u in chunks(e, Empirical(), Rng(0)))
        assert_close(total / case.terms, flat(e.gradient()))


def test_settings():
    with pytest.raises(InputError, match="Exact budget_bytes: expected an integer > 0, got 0"):
        Exact(budget_bytes=0)
    with pytest.raises(InputError, match="MonteCarlo samples: expected an integer > 0, got 0"):
        MonteCarlo(samples=0)
