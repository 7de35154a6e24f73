"""Where K-FAC is exact, where it is not, and by how much.

Elsewhere (`test_curvature_dense`) the exact blocks are held against automatic differentiation; here
they are what K-FAC is compared with.
"""

from __future__ import annotations

import numpy as np
import pytest
from cases import NETWORKS, NetworkCase, real_targets
from curvature_cases import CURVATURES as CASES
from curvature_cases import FISHERS, SHARING, estimate, supported
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_close, frobenius_distance, host
from toys import LinearOverPositions, MeanOverPositions

from kfac_np import trees
from kfac_np.backend import Array, Backend, Rng
from kfac_np.curvature import BlockDiagonal, ExactBlock
from kfac_np.fisher import Empirical, Exact, FisherType, MonteCarlo
from kfac_np.layers import Dense, Layer, Sequential, Tanh
from kfac_np.losses import (
    Loss,
    PoissonLogRate,
    SigmoidCrossEntropy,
    SoftmaxCrossEntropy,
    SquaredError,
)
from kfac_np.objective import Evaluation, Objective
from kfac_np.statistics import ElementwiseStatistics, EmbeddingStatistics

EXACT = BlockDiagonal(ExactBlock())


def distances(e: Evaluation, sharing: str, fisher: FisherType) -> dict[str, float]:
    """‖K-FAC - exact‖_F / ‖exact‖_F of every layer, both with the same vectors."""
    kfac = SHARING[sharing].matrix(estimate(SHARING[sharing], e, fisher), e.params)
    block = EXACT.matrix(estimate(EXACT, e, fisher), e.params)
    pairs = zip(trees.items(kfac.blocks), trees.leaves(block.blocks), strict=True)
    return {path: frobenius_distance(a.to_dense(), b.to_dense()) for (path, a), b in pairs}


def shared(case: NetworkCase, sharing: str) -> bool:
    """Whether the case is one of those that `sharing` may be used with."""
    return supported(CASES["kfac reduce" if sharing == "reduce" else "kfac"], case)


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_exact_where_the_case_says_so_and_nowhere_else(
    backend: Backend, case: NetworkCase, sharing: str
):
    """Inexact means that some layer is off by more than 1 %, not by rounding."""
    if not shared(case, sharing):
        assert sharing not in case.kfac_exact
        return
    found = distances(case.build(backend).evaluate(), sharing, Exact())
    if sharing in case.kfac_exact:
        assert max(found.values()) <= 1e-14
    else:
        assert max(found.values()) >= 0.01


@pytest.mark.parametrize("fisher", [*FISHERS.values(), MonteCarlo(1)], ids=repr)
@pytest.mark.parametrize(
    "loss",
    [SquaredError(), SigmoidCrossEntropy(), SoftmaxCrossEntropy(), PoissonLogRate()],
    ids=lambda loss: type(loss).__name__,
)
def test_one_example_without_sharing(backend: Backend, loss: Loss, fisher: FisherType):
    """E[a aᵀ ⊗ g gᵀ] over one example is a product, whatever the vectors."""
    network = Sequential(Dense(3, 4), Tanh(), Dense(4, 4, bias=False), Tanh(), Dense(4, 2))
    e = batch(backend, network, loss, (1, 3), weight=1.7)
    assert max(distances(e, "expand", fisher).values()) <= 1e-14
    assert max(distances(e, "reduce", fisher).values()) <= 1e-14


@given(data=st.data())
def test_deep_linear_network_with_squared_error(backend: Backend, data: st.DataObject):
    """G does not depend on the example: it is the square of the weights above."""
    widths = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=5))
    biases = data.draw(st.lists(st.booleans(), min_size=4, max_size=4))
    network = linear(widths, biases)
    e = batch(backend, network, SquaredError(), (data.draw(st.integers(1, 6)), widths[0]))
    for sharing in SHARING:
        assert max(distances(e, sharing, Exact()).values()) <= 1e-13


@given(data=st.data())
def test_expand_with_a_loss_at_every_position(backend: Backend, data: st.DataObject):
    widths = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    biases = data.draw(st.lists(st.booleans(), min_size=3, max_size=3))
    n, positions = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    e = batch(backend, linear(widths, biases), SquaredError(), (n, positions, widths[0]))
    assert max(distances(e, "expand", Exact()).values()) <= 1e-13


class SumOverPositions(LinearOverPositions):
    """Sum pooling, (N, S, d) to (N, d)."""

    def rows(self, positions: int) -> list[list[float]]:
        return [[1.0] * positions]

    def shape_after(self, positions: int) -> tuple[int, ...]:
        return ()


@pytest.mark.parametrize("pool", [MeanOverPositions(), SumOverPositions()], ids=["mean", "sum"])
@given(data=st.data())
def test_reduce_with_pooling(backend: Backend, pool: Layer, data: st.DataObject):
    """Linear layers, a mean or a sum over the positions, linear layers."""
    widths = data.draw(st.lists(st.integers(1, 4), min_size=3, max_size=4))
    biases = data.draw(st.lists(st.booleans(), min_size=3, max_size=3))
    n, positions = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    layers = linear(widths, biases).layers
    after = data.draw(st.integers(1, len(layers)))
    network = Sequential(*layers[:after], pool, *layers[after:])
    e = batch(backend, network, SquaredError(), (n, positions, widths[0]))
    assert max(distances(e, "reduce", Exact()).values()) <= 1e-13


@pytest.mark.parametrize(
    ("fisher", "least"),
    [(Empirical(), 0.2), (MonteCarlo(1), 0.2), (MonteCarlo(50), 0.02)],
    ids=repr,
)
def test_other_fishers_are_inexact_for_a_deep_linear_network(
    backend: Backend, fisher: FisherType, least: float
):
    """Their g depends on the example: exact for one example or in expectation only."""
    network = linear([3, 4, 2], [True, True])
    e = batch(backend, network, SquaredError(), (6, 3))
    assert min(distances(e, "expand", fisher).values()) >= least


def test_expand_and_reduce_are_inexact_in_each_others_setting(backend: Backend):
    layers = linear([3, 3, 2], [True, False]).layers
    pooled = Sequential(*layers, MeanOverPositions())
    e = batch(backend, pooled, SquaredError(), (5, 4, 3))
    assert min(distances(e, "expand", Exact()).values()) >= 0.5
    # Nothing is averaged: reduced factors of one loss term an example, but a map over positions.
    e = batch(backend, Sequential(*layers, Picked()), SquaredError(), (5, 4, 3))
    assert min(distances(e, "reduce", Exact()).values()) >= 0.5


class Picked(LinearOverPositions):
    """The first position alone."""

    def rows(self, positions: int) -> list[list[float]]:
        return [[1.0] + [0.0] * (positions - 1)]

    def shape_after(self, positions: int) -> tuple[int, ...]:
        return ()


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize(
    "case",
    [
        c
        for c in NETWORKS
        if len(c.shape) == 2 and not c.weighted and not (c.classes and c.shape[1] > 1)
    ],
    ids=str,
)
def test_what_kfac_leaves_out_is_a_covariance(backend: Backend, case: NetworkCase, fisher: str):
    """exact - G ⊗ A = (1/N) Σ_n (Σ_k g gᵀ - G) ⊗ (ā āᵀ - A), for T = 1.

    Where examples are coupled, what two of them have to do with each other is left out, too:
    (1/N) Σ_k Σ_{n≠m} g_kn g_kmᵀ ⊗ ā_n ā_mᵀ.
    """
    e = case.build(backend).evaluate()
    kind = FISHERS[fisher]
    block = EXACT.matrix(estimate(EXACT, e, kind), e.params)
    a: dict[str, np.ndarray] = {}
    g: dict[str, list[np.ndarray]] = {}
    for statistics in kind.statistics(e, Rng(0)):
        for path, s in trees.items(statistics):
            if isinstance(s, ElementwiseStatistics):  # no Kronecker product
                continue
            one_hot = isinstance(s, EmbeddingStatistics)
            a[path] = np.eye(s.size)[host(s.indices)[:, 0]] if one_hot else host(s.a)[:, 0, :]
            g.setdefault(path, []).append(host(s.g)[:, :, 0, :])
    exact = dict(trees.items(block.blocks))
    for path, parts in g.items():
        v = np.concatenate(parts)
        n_by_n = np.einsum("kni,knj->nij", v, v)
        aa = np.einsum("ni,nj->nij", a[path], a[path])
        A, G = aa.mean(0), n_by_n.mean(0)
        terms = [np.kron(gn - G, an - A) for gn, an in zip(n_by_n, aa, strict=True)]
        expected = np.kron(G, A) + np.mean(terms, axis=0)
        if case.coupled:
            u = np.einsum("kni,nj->knij", v, a[path]).reshape(*v.shape[:2], -1)
            different = 1.0 - np.eye(len(aa))
            pairs = np.einsum("knp,kmq,nm->pq", u, u, different, optimize=True)
            expected = expected + pairs / len(aa)
        assert_close(host(exact[path].to_dense()), expected)


def linear(widths: list[int], biases: list[bool]) -> Sequential:
    steps = zip(widths[:-1], widths[1:], biases[: len(widths) - 1], strict=True)
    return Sequential(*(Dense(i, o, bias=bias) for i, o, bias in steps))


def batch(
    backend: Backend,
    network: Layer,
    loss: Loss,
    shape: tuple[int, ...],
    weight: float | None = None,
) -> Evaluation:
    """An evaluation at random parameters, biases too, with targets sampled from the model."""
    draw = np.random.default_rng(7).standard_normal

    def fresh(p: Array) -> Array:
        return backend.asarray(draw(p.shape) / np.sqrt(p.shape[-1]))

    params = trees.tree_map(fresh, network.init(Rng(0), backend))
    x = backend.asarray(draw(shape))
    z, _ = network.forward(params, x)
    t = loss.sample_targets(Rng(1), z)
    if isinstance(loss, SquaredError):
        t = backend.asarray(real_targets(np.random.default_rng(8), z.shape))
    weights = None if weight is None else weight * backend.ones(shape[:1])
    return Objective(network, loss).evaluate(params, x, t, weights)
