"""Embeddings: the same numbers as a dense layer on one-hot inputs, which are never formed."""

from __future__ import annotations

import numpy as np
import pytest
from numerics import assert_close

from kfac_np import products, trees
from kfac_np.backend import Backend, Rng, to_numpy
from kfac_np.curvature import (
    BlockDiagonal,
    DiagonalBlock,
    ExactBlock,
    FullMatrix,
    KFACBlock,
    no_pi,
    pi_frobenius,
    pi_spectral,
    plain,
)
from kfac_np.errors import CurvatureError, InputError, ShapeError
from kfac_np.fisher import Exact, InputOnly, MonteCarlo
from kfac_np.layers import Dense, Embedding, Flatten, Residual, Sequential, Tanh
from kfac_np.losses import SoftmaxCrossEntropy, SquaredError
from kfac_np.objective import Evaluation, Objective

SIZE, D = 5, 3
INDICES = np.asarray([[0, 2, 2], [4, 0, 2], [2, 2, 2], [4, 4, 0]])  # 1 and 3 never occur
ABOVE = (Tanh(), Flatten(), Dense(9, 2))
EMBEDDED = Sequential(Embedding(SIZE, D), *ABOVE)
ONE_HOT = Sequential(Dense(SIZE, D, bias=False), *ABOVE)
CURVATURES = {
    "kfac": BlockDiagonal(),
    "kfac frobenius": BlockDiagonal(KFACBlock(rule=pi_frobenius)),
    "kfac spectral": BlockDiagonal(KFACBlock(rule=pi_spectral)),
    "kfac no pi": BlockDiagonal(KFACBlock(rule=no_pi)),
    "kfac plain": BlockDiagonal(KFACBlock(rule=plain)),
    "kfac exactly damped": BlockDiagonal(KFACBlock(exact_damping=True)),
    "diagonal": BlockDiagonal(DiagonalBlock()),
    "exact blocks": BlockDiagonal(ExactBlock()),
    "full": FullMatrix(),
}


def both(backend: Backend, *, weighted: bool) -> tuple[Evaluation, Evaluation]:
    """The embedding and its one-hot twin at the same point."""
    params = EMBEDDED.init(Rng(0), backend)
    t = backend.asarray(np.asarray([0, 1, 1, 0]))
    w = backend.asarray(np.asarray([0.3, 1.0, 2.0, 0.7])) if weighted else None
    x = backend.asarray(INDICES)
    hot = backend.asarray(np.eye(SIZE)[INDICES])
    return (
        Objective(EMBEDDED, SoftmaxCrossEntropy()).evaluate(params, x, t, w),
        Objective(ONE_HOT, SoftmaxCrossEntropy()).evaluate(params, hot, t, w),
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_values_derivatives_and_products(weighted: bool, backend: Backend):
    e, twin = both(backend, weighted=weighted)
    v = EMBEDDED.init(Rng(7), backend)
    assert e.value == pytest.approx(twin.value, rel=1e-14)
    assert_close(e.gradient(), twin.gradient())
    assert_close(e.jvp(v), twin.jvp(v))
    for product in (products.ggn_product, products.hessian_product):
        assert_close(product(e, v), product(twin, v))
    assert_close(e.take(2).gradient(), twin.take(2).gradient())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fisher", [Exact(), MonteCarlo(2), InputOnly()], ids=repr)
@pytest.mark.parametrize("name", CURVATURES)
def test_curvature(name: str, fisher, weighted: bool, backend: Backend):
    """Matrices and solutions; A of the embedding is stored as its diagonal."""
    curvature = CURVATURES[name]
    e, twin = both(backend, weighted=weighted)
    if isinstance(fisher, InputOnly) and not name.startswith("kfac"):
        with pytest.raises(CurvatureError, match="expected a Fisher type with vectors"):
            curvature.estimate(e, fisher, Rng(1))
        return
    moments, expected = (curvature.estimate(f, fisher, Rng(1)) for f in (e, twin))
    if name.startswith("kfac"):
        assert moments["0"]["A"].shape == (SIZE,)
        assert_close(moments["0"]["A"], np.diag(to_numpy(expected["0"]["A"])))
    params, v = e.params, EMBEDDED.init(Rng(7), backend)
    matrix, other = (curvature.matrix(m, params) for m in (moments, expected))
    assert_close(matrix.to_dense(), other.to_dense())
    assert_close(matrix.matvec(v), other.matvec(v))
    assert float(matrix.trace()) == pytest.approx(float(other.trace()), rel=1e-13)
    assert_close(matrix.solve(v, 0.1), other.solve(v, 0.1))
    (factors, events), (others, _) = (curvature.factorise(m, 0.1) for m in (moments, expected))
    assert not events
    assert_close(curvature.solve(factors, v), curvature.solve(others, v))


def test_inputs_that_never_occur_do_not_move_however_small_the_damping(backend: Backend):
    """Their gradient is zero; where A is zero the ladder puts in the least that can be told."""
    e, _ = both(backend, weighted=False)
    factors, events = CURVATURES["kfac"].factorise(
        CURVATURES["kfac"].estimate(e, Exact(), Rng(0)), 1e-40
    )
    assert {(event.layer, event.rung) for event in events} >= {("0", "eigenvalues clipped")}
    step = to_numpy(CURVATURES["kfac"].solve(factors, e.gradient())[0])
    assert np.all(np.isfinite(step))
    np.testing.assert_array_equal(step[:, [1, 3]], 0.0)


@pytest.mark.parametrize("rule", [no_pi, pi_frobenius, pi_spectral, plain])
def test_damping_rules_take_a_diagonal(rule, backend: Backend):
    a, g = np.asarray([0.5, 0.0, 3.0]), np.asarray([[2.0, 0.3], [0.3, 1.0]])
    diagonal = rule(backend.asarray(a), backend.asarray(g), 0.3)
    full = rule(backend.asarray(np.diag(a)), backend.asarray(g), 0.3)
    assert [float(x) for x in diagonal] == pytest.approx([float(x) for x in full], rel=1e-14)


def test_moments_that_are_not_finite_keep_the_last_inverse(backend: Backend):
    curvature = CURVATURES["kfac"]
    e, _ = both(backend, weighted=False)
    moments = curvature.estimate(e, Exact(), Rng(0))
    good, _ = curvature.factorise(moments, 0.1)
    bad = {**moments, "0": {**moments["0"], "A": np.nan * moments["0"]["A"]}}
    kept, events = curvature.factorise(bad, 0.1, good)
    assert_close(kept["0"]["A_inverse"], good["0"]["A_inverse"])
    assert ("0", "A", "kept the last inverse") in {(v.layer, v.factor, v.rung) for v in events}


# ---------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("kind", ["int32", "int64", "uint8", "uint64"])
def test_all_kinds_of_integers(kind: str, backend: Backend):
    params = EMBEDDED.init(Rng(0), backend)
    x = backend.asarray(INDICES.astype(kind))
    objective = Objective(EMBEDDED, SoftmaxCrossEntropy())
    e = objective.evaluate(params, x, backend.asarray(np.asarray([0, 1, 1, 0])))
    assert_close(e.gradient(), both(backend, weighted=False)[0].gradient())


@pytest.mark.parametrize(
    ("indices", "came"),
    [
        ([[0, -1]], "-1..0"),
        ([[5, 1]], "1..5"),
        ([[0], [7]], "0..7"),
        (np.uint64([[0, 2**64 - 1]]), "-1..0 (uint64 as int64)"),
        (np.uint64([[2**63, 1]]), f"{-(2**63)}..1 (uint64 as int64)"),
    ],
)
def test_numbers_out_of_range(indices, came: str, backend: Backend):
    network = Sequential(Sequential(Embedding(SIZE, D)), Tanh())
    params, x = network.init(Rng(0), backend), backend.asarray(np.asarray(indices))
    with pytest.raises(InputError) as error:
        Objective(network, SquaredError()).evaluate(params, x, backend.ones((*x.shape, D)))
    assert str(error.value) == f"x: Embedding(5, 3) expected integers 0..4, got {came}"


@pytest.mark.parametrize("kind", ["float64", "bool"])
def test_other_numbers(kind: str, backend: Backend):
    x = backend.xp.astype(backend.ones((2, 3)), getattr(backend.xp, kind))
    params = EMBEDDED.init(Rng(0), backend)
    for call in (
        lambda: Objective(EMBEDDED, SquaredError()).evaluate(params, x, backend.ones((2, 2))),
        lambda: EMBEDDED.forward(params, x),
    ):
        with pytest.raises(InputError, match=r"x: Embedding\(5, 3\) expected an array of integers"):
            call()
    with pytest.raises(InputError, match="x: expected an array, got list"):
        Objective(EMBEDDED, SquaredError()).evaluate(params, INDICES.tolist(), x)


def test_other_layers_take_no_integers(backend: Backend):
    network = Sequential(Dense(3, 2), Embedding(2, 2))
    x = backend.asarray(np.ones((2, 3), dtype=int))
    with pytest.raises(InputError, match="x: expected an array of floats"):
        Objective(network, SquaredError()).evaluate(
            network.init(Rng(0), backend), x, backend.ones((2, 2))
        )


def test_shapes(backend: Backend):
    layer = Embedding(SIZE, D)
    assert layer.output_shape((4, 2)) == (4, 2, D)
    with pytest.raises(ShapeError, match=r"Embedding\(5, 3\): expected inputs \(N, T, ...\), got"):
        layer.output_shape(())
    with pytest.raises(ShapeError, match=r"Embedding\(5, 3\): expected parameters \(3, 5\), got"):
        layer.forward(backend.ones((5, 3)), backend.asarray(INDICES))
    with pytest.raises(ShapeError, match="expected the initializer to return shape"):
        Embedding(5, 3, lambda rng, fan_in, fan_out, b: b.ones((5, 3))).init(Rng(0), backend)
    for sizes in ((0, 3), (5, -1), (2.0, 3), (5, True)):
        with pytest.raises(InputError, match=r"Embedding \w+: expected an integer > 0"):
            Embedding(*sizes)


def test_dtype_of_inputs(backend: Backend):
    """What `describe` makes its example of."""
    assert EMBEDDED.input_dtype(backend.ones((1,))) == backend.xp.int64
    assert Sequential(Dense(3, 2)).input_dtype(backend.ones((1,))) == backend.dtype


def test_two_embeddings_of_the_same_inputs(backend: Backend):
    """Branches that begin with embeddings: neither has an input derivative."""
    network = Sequential(
        Residual(Sequential(Embedding(SIZE, D), Tanh()), shortcut=Embedding(SIZE, D)), *ABOVE
    )
    params = network.init(Rng(0), backend)
    e = Objective(network, SoftmaxCrossEntropy()).evaluate(
        params, backend.asarray(INDICES), backend.asarray(np.asarray([0, 1, 1, 0]))
    )
    v, h = network.init(Rng(5), backend), 1e-6

    def value(step: float) -> float:
        moved = trees.axpy(step, v, params)
        return e.objective.value(moved, e.inputs, e.targets)

    slope = float(trees.inner(e.gradient(), v))
    assert (value(h) - value(-h)) / (2 * h) == pytest.approx(slope, rel=1e-7)


def test_initial_columns_have_unit_variance():
    w = to_numpy(Embedding(300, 200).init(Rng(0), Backend.of(np.zeros(1))))
    assert w.shape == (200, 300)
    assert abs(w.var() - 1.0) < 5 * (2 / w.size) ** 0.5
