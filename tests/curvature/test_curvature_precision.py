"""Backends agree to rounding; single precision loses what the condition number says, no more."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from cases import NetworkCase, networks, to_backend
from curvature_cases import CURVATURES, FISHERS, estimate, supported
from numerics import assert_close, flat, frobenius_distance, host

from kfac_np import trees
from kfac_np.backend import Backend, get_backend
from kfac_np.curvature import EKFAC, BlockDiagonal, KFACBlock
from kfac_np.curvature.ladder import Ladder
from kfac_np.fisher import Exact
from kfac_np.layers import Dense, Sequential, Tanh
from kfac_np.losses import SigmoidCrossEntropy
from kfac_np.objective import Evaluation, Objective

EPS32 = float(np.finfo(np.float32).eps)
PROBLEMS = [
    c
    for c in networks()
    if c.name in ("relu_softmax", "logistic_sigmoid", "residual_nested", "positions_mixed_softmax")
]
PAIRS = [(c, name) for c in PROBLEMS for name in CURVATURES if supported(CURVATURES[name], c)]


def single(backend: Backend) -> Backend:
    return dataclasses.replace(backend, dtype=backend.xp.float32)


def evaluate(backend: Backend, case: NetworkCase) -> Evaluation:
    params, x, t, weights = case.host()
    w = None if weights is None else backend.asarray(weights)
    return Objective(case.network, case.loss).evaluate(
        to_backend(backend, params), backend.asarray(x), backend.asarray(t), w
    )


def step(backend: Backend, case: NetworkCase, name: str, damping: float = 0.05) -> Any:
    """Moments, and the solution for a fixed vector; of EKFAC the matrix in place of moments.

    An eigenbasis may have other signs, and does not change smoothly.
    """
    e, curvature = evaluate(backend, case), CURVATURES[name].curvature
    moments = estimate(curvature, e)
    factors, events = curvature.factorise(moments, damping)
    assert not events
    if isinstance(curvature, EKFAC):
        moments = curvature.matrix(moments, e.params).to_dense()
    return moments, curvature.solve(factors, case.tangent(backend))


@pytest.mark.parametrize(("case", "name"), PAIRS, ids=str)
def test_every_backend_agrees_with_numpy(backend: Backend, case: NetworkCase, name: str):
    ours, reference = (step(b, case, name) for b in (backend, get_backend("numpy", "float64")))
    for mine, theirs in zip(ours, reference, strict=True):
        assert_close(trees.ravel(mine), trees.ravel(theirs))


@pytest.mark.parametrize("fisher", FISHERS)
def test_every_backend_draws_the_same_targets(backend: Backend, fisher: str):
    for case in PROBLEMS:
        ours, reference = (
            estimate(BlockDiagonal(), evaluate(b, case), FISHERS[fisher])
            for b in (backend, get_backend("numpy", "float64"))
        )
        assert_close(trees.ravel(ours), trees.ravel(reference))


@pytest.mark.parametrize(("case", "name"), PAIRS, ids=str)
def test_single_precision(backend: Backend, case: NetworkCase, name: str):
    """Moments to 50 roundings; solutions to 50 times the damped condition, about 100 here."""
    ours, reference = step(single(backend), case, name), step(backend, case, name)
    assert_close(trees.ravel(ours[0]), trees.ravel(reference[0]), 50 * EPS32)
    assert_close(trees.ravel(ours[1]), trees.ravel(reference[1]), 50 * 100 * EPS32)
    assert all(x.dtype == single(backend).dtype for x in trees.leaves(ours))


def ill_conditioned(n: int, condition: float, *, common: bool) -> np.ndarray:
    """Eigenvalues over the whole range, or one large one for the direction that inputs share.

    The second is what positive activations and a bias make of A: 11ᵀ and something small.
    """
    if common:
        return np.ones((n, n)) + n / condition * np.eye(n)
    u = np.linalg.qr(np.random.default_rng(n).standard_normal((n, n)))[0]
    m = (u * np.geomspace(1.0, 1.0 / condition, n)) @ u.T
    return 0.5 * (m + m.T)


@pytest.mark.parametrize("common", [False, True], ids=["spread", "common direction"])
@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("n", [10, 96, 97, 300])
def test_single_precision_inverse(backend: Backend, n: int, condition: float, common: bool):
    """‖M⁻¹ - exact‖_F ≤ 4 κ ε ‖exact‖_F: the inverse of a matrix that has been rounded once."""
    m = backend.xp.astype(
        backend.asarray(ill_conditioned(n, condition, common=common)), backend.xp.float32
    )
    ladder = Ladder("0")
    found = host(ladder.inverse("A", m, 0.0, None))
    exact = np.linalg.inv(host(m).astype(np.float64))
    assert ladder.events == []
    assert frobenius_distance(found.astype(np.float64), exact) <= 4 * condition * EPS32


def test_damping_is_what_makes_single_precision_possible(backend: Backend):
    """A factor of condition 1e9: hardly damped it steps down the ladder.

    Damped by λ = 1e-4, the product's condition is 1e4, and that of each of two factors its root.
    """
    A = ill_conditioned(60, 1e9, common=False)
    G = ill_conditioned(5, 10.0, common=False)
    v = np.random.default_rng(0).standard_normal((5, 60))

    def solved(b: Backend, block: KFACBlock, damping: float) -> Any:
        moments = {"0": {"A": b.asarray(A), "G": b.asarray(G)}}
        factors, events = BlockDiagonal(block).factorise(moments, damping)
        return host(BlockDiagonal(block).solve(factors, (b.asarray(v),))[0]), events

    for block, condition in ((KFACBlock(), 1e2), (KFACBlock(exact_damping=True), 1e4)):
        hardly, events = solved(single(backend), block, 1e-30)
        assert len(events) == 1
        assert np.all(np.isfinite(hardly))
        low, events = solved(single(backend), block, 1e-4)
        high, _ = solved(backend, block, 1e-4)
        assert events == []
        assert frobenius_distance(low.astype(np.float64), high) <= 10 * condition * EPS32


def test_the_exact_fisher_in_single_precision_of_a_wide_layer(backend: Backend):
    """Sums of many small squares: relative error of a moment stays at some roundings."""
    rng = np.random.default_rng(0)
    network = Sequential(Dense(50, 20), Tanh(), Dense(20, 60))
    params = (rng.standard_normal((20, 51)) / 7, (), rng.standard_normal((60, 21)) / 4)
    x, t = rng.standard_normal((200, 50)), (rng.random((200, 60)) > 0.5).astype(float)
    found = []
    for b in (single(backend), backend):
        e = Objective(network, SigmoidCrossEntropy()).evaluate(
            to_backend(b, params), b.asarray(x), b.asarray(t)
        )
        found.append(flat(trees.ravel(estimate(BlockDiagonal(), e, Exact(2**20)))))
    assert_close(found[0], found[1], 20 * EPS32)
