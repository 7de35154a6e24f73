"""Weights used several times: exact blocks, factors by hand, and where factors are exact.

Peers keep the statistics of the last use, or crash; what would come of that is computed here, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import autograd
import autograd.numpy as anp
import numpy as np
import pytest
from cases import SOFTMAX, SQUARED, NetworkCase, class_targets, networks, to_backend
from curvature_cases import SHARING, dense, estimate, layer_slices
from numerics import assert_close, frobenius_distance, host
from references.dense import dense as reference

from kfac_np import KFAC, Objective, trees
from kfac_np.backend import Backend, Rng, get_backend
from kfac_np.curvature import BlockDiagonal, DiagonalBlock, ExactBlock, FullMatrix
from kfac_np.layers import Dense, GlobalAveragePool, Layer, Recurrent, Sequential, Tanh, Tied
from kfac_np.optimizers import LevenbergMarquardt

Unrolled = Callable[[Any, Any, Any], tuple[Any, list[Any]]]
"""(params, x, noise) -> outputs, and the uses' inputs; noise[t] is added to the t-th use's s."""

EXACT = 1e-14


def with_one(x: Any) -> Any:
    return anp.concatenate([x, np.ones((len(x), 1))], axis=1)


def tied(params: Any, x: Any, noise: Any) -> tuple[Any, list[Any]]:
    first, (w, _) = params
    inputs, s = [], anp.matmul(with_one(x), first.T)
    for use in range(3):
        inputs.append(with_one(anp.tanh(s) if use else s))
        s = anp.matmul(inputs[-1], w.T) + noise[use]
    return s, inputs


def recurrent(params: Any, x: Any, noise: Any) -> tuple[Any, list[Any]]:
    (w, _), _, last = params
    inputs, states, h = [], [], np.zeros((len(x), 2))
    for use in range(x.shape[1]):
        inputs.append(with_one(anp.concatenate([x[:, use], h], axis=1)))
        h = anp.tanh(anp.matmul(inputs[-1], w.T) + noise[use])
        states.append(h)
    return anp.matmul(with_one(sum(states) / len(states)), last.T), inputs


BY_HAND = [("tied_softmax", "1.0", tied, 3), ("recurrent_sigmoid", "0.0", recurrent, 2)]


def uses(case: NetworkCase, unrolled: Unrolled, d_out: int) -> tuple[Any, Any]:
    """Inputs (N, T, d_in + 1), and ∂z/∂s (N, C, T, d_out), of each use."""
    params, x, _, _ = case.host()
    n = len(x)
    still = np.zeros((3, n, d_out))
    jacobian = autograd.jacobian(lambda noise: unrolled(params, x, noise)[0])(still)
    own = np.stack([jacobian[i, :, :, i, :] for i in range(n)])
    return np.stack(unrolled(params, x, still)[1], axis=1), own


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize(("name", "path", "unrolled", "d_out"), BY_HAND)
def test_factors_by_hand(
    backend: Backend, name: str, path: str, unrolled: Unrolled, d_out: int, sharing: str
):
    """From the inputs and derivatives of every use, which autograd finds in the unrolled net."""
    (case,) = networks(name=name)
    a, j = uses(case, unrolled, d_out)
    weights, inner = reference(case).weights, reference(case).output_hessians
    if sharing == "expand":
        A = np.einsum("n,nti,ntj->ij", weights, a, a) / (weights.sum() * a.shape[1])
        G = np.einsum("n,ncti,ncd,ndtj->ij", weights, j, inner, j) / case.terms
    else:
        mean, total = a.mean(axis=1), j.sum(axis=2)
        A = np.einsum("n,ni,nj->ij", weights, mean, mean) / weights.sum()
        G = np.einsum("n,nci,ncd,ndj->ij", weights, total, inner, total) / case.terms
    found = estimate(SHARING[sharing], case.build(backend).evaluate())[path]
    assert_close(found["A"], A)
    assert_close(found["G"], G)


@pytest.mark.parametrize(("name", "path", "unrolled", "d_out"), BY_HAND)
def test_the_exact_block_is_that_of_all_uses(
    backend: Backend, name: str, path: str, unrolled: Unrolled, d_out: int
):
    (case,) = networks(name=name)
    e = case.build(backend).evaluate()
    fisher = reference(case).fisher
    rows = dict(layer_slices(e.params))[path]
    exact = estimate(BlockDiagonal(ExactBlock()), e)[path]["block"]
    assert_close(exact, fisher[rows, rows])
    diagonal = estimate(BlockDiagonal(DiagonalBlock()), e)[path]["diagonal"]
    assert_close(host(diagonal).ravel(), np.diag(fisher)[rows])
    assert_close(dense(FullMatrix(), e), fisher)

    # With the last use alone, as if it had overwritten the others, the block is another.
    a, j = uses(case, unrolled, d_out)
    u = np.einsum("nci,nj->ncij", j[:, :, -1], a[:, -1]).reshape(*j.shape[:2], -1)
    weights, inner = reference(case).weights, reference(case).output_hessians
    last = np.einsum("n,ncp,ncd,ndq->pq", weights, u, inner, u) / case.terms
    assert frobenius_distance(last, exact) > 0.4


def test_the_exact_block_is_the_sum_over_pairs_of_untied_copies(backend: Backend):
    layers, order = (Dense(3, 3), Tanh()), (0, 1, 0, 1, 0)
    case = NetworkCase("tied alone", Tied(layers, order), (4, 3), SOFTMAX, class_targets)
    problem = case.build(backend)
    copies = Sequential(*(layers[i] for i in order))
    untied = tuple(problem.params[i] for i in order)
    e = Objective(copies, SOFTMAX).evaluate(untied, problem.x, problem.t)
    full, parts = dense(FullMatrix(), e), dict(layer_slices(untied)).values()
    expected = sum(full[i, j] for i in parts for j in parts)
    assert_close(dense(BlockDiagonal(ExactBlock()), problem.evaluate()), expected)


# ---------------------------------------------------------------------- where factors are exact


def distance(network: Layer, params: Any, x: Any, sharing: str) -> float:
    """‖G ⊗ A - exact block‖ / ‖exact block‖ for squared error; targets play no part."""
    backend = get_backend("numpy", "float64")
    params, x = to_backend(backend, params), backend.asarray(x)
    z, _ = network.forward(params, x)
    e = Objective(network, SQUARED).evaluate(params, x, z)
    return frobenius_distance(dense(SHARING[sharing], e), dense(BlockDiagonal(ExactBlock()), e))


@pytest.mark.parametrize("times", [1, 2, 3, 5])
def test_uses_that_all_agree(times: int):
    """y = W ... W x at W = I: every use has the same input and the same derivative.

    `reduce` is exact; `expand` leaves out the pairs of different uses, all as large as those of
    equal ones, and is the exact block divided by the number of uses.
    """
    x = np.random.default_rng(0).standard_normal((6, 3))
    network = Tied((Dense(3, 3, bias=False),), (0,) * times)
    assert distance(network, (np.eye(3),), x, "reduce") < EXACT
    assert distance(network, (np.eye(3),), x, "expand") == pytest.approx(1.0 - 1.0 / times)


def test_uses_that_do_not_agree():
    """A deep linear network, for which untied K-FAC is exact: neither rule is, once it is tied."""
    seed = np.random.default_rng(0)
    x, w = seed.standard_normal((6, 3)), seed.standard_normal((3, 3)) / 2.0
    network = Tied((Dense(3, 3, bias=False),), (0, 0))
    untied = Sequential(*[Dense(3, 3, bias=False)] * 2)
    assert distance(network, (w,), x, "expand") > 0.3
    assert distance(network, (w,), x, "reduce") > 0.3
    assert distance(untied, (w, w), x, "expand") < EXACT


def recurrent_linear(feedback: float, examples: int = 6, positions: int = 4) -> tuple[Any, Any]:
    """Weights of h ← W x + c R h + b with a rotation R, and inputs."""
    inward, turn = [[1.0, 0.5], [-0.3, 0.8]], [[0.6, 0.8], [-0.8, 0.6]]
    w = np.concatenate([inward, feedback * np.asarray(turn), [[0.2], [-0.4]]], axis=1)
    x = np.random.default_rng(0).standard_normal((6, 4, 2))
    return w, x[:examples, :positions]


@pytest.mark.parametrize(
    ("feedback", "stated"), [(0.0, 0.0), (0.1, 0.077), (0.3, 0.207), (1.0, 0.610)]
)
def test_a_loss_at_every_state(feedback: float, stated: float):
    """Linear, squared error: `expand` is exact without feedback, and loses what is stated with.

    Without feedback a term reaches the weights through its own position alone.
    """
    w, x = recurrent_linear(feedback)
    found = distance(Recurrent(Dense(4, 2), 2), w, x, "expand")
    assert found == pytest.approx(stated, abs=5e-4)


@pytest.mark.parametrize(
    ("feedback", "reduced", "expanded"),
    [(0.0, 0.0, 0.725), (0.1, 0.021, 0.723), (0.3, 0.067, 0.716), (1.0, 0.429, 0.645)],
)
def test_a_loss_of_the_mean_state(feedback: float, reduced: float, expanded: float):
    """`reduce` is exact without feedback: all derivatives agree; `expand` is far off throughout."""
    w, x = recurrent_linear(feedback)
    network, params = Sequential(Recurrent(Dense(4, 2), 2), GlobalAveragePool()), (w, ())
    assert distance(network, params, x, "reduce") == pytest.approx(reduced, abs=5e-4)
    assert distance(network, params, x, "expand") == pytest.approx(expanded, abs=5e-4)


def test_one_example_is_not_enough_where_weights_are_reused():
    """With one example any plain layer's factors are exact; those of four uses are not."""
    network = Sequential(Recurrent(Dense(4, 2), 2), GlobalAveragePool())
    for sharing, stated in (("expand", 0.669), ("reduce", 0.374)):
        w, x = recurrent_linear(1.0, examples=1)
        assert distance(network, (w, ()), x, sharing) == pytest.approx(stated, abs=5e-4)
        w, x = recurrent_linear(1.0, examples=1, positions=1)  # one use
        assert distance(network, (w, ()), x, sharing) < EXACT


@pytest.mark.parametrize("sharing", SHARING)
def test_kfac_trains_a_recurrent_network(sharing: str):
    """The running mean of a signal's sign, which the state has to remember."""
    backend = get_backend("numpy", "float64")
    x = Rng(0).normal((64, 5, 1), backend)
    t = np.mean(np.sign(x), axis=1)
    network = Sequential(
        Recurrent(Sequential(Dense(5, 4), Tanh()), 4), GlobalAveragePool(), Dense(4, 1)
    )
    kfac = KFAC(
        Objective(network, SQUARED),
        curvature=SHARING[sharing],
        damping=LevenbergMarquardt(initial=1.0),
    )
    state = kfac.init(network.init(Rng(1), backend))
    losses = []
    for _ in range(30):
        state, report = kfac.step(state, x, t)
        losses.append(report.loss)
    assert losses[-1] < 0.1 * losses[0]
    assert set(dict(trees.items(state.params))) == {"0.0", "2"}
