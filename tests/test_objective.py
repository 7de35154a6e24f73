"""The objective: values and gradients, weights, scale, and everything that it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from cases import NETWORKS, NetworkCase, networks
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_close, flat
from references.dense import dense

from kfac_np import trees
from kfac_np.backend import Backend, Rng, get_backend, to_numpy
from kfac_np.errors import InputError, ShapeError, TargetError
from kfac_np.layers import Activation, Dense, Flatten, Identity, Sequential, Tanh
from kfac_np.losses import SigmoidCrossEntropy, SoftmaxCrossEntropy, SquaredError
from kfac_np.objective import Evaluation, Objective
from kfac_np.statistics import Scale


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_value_and_gradient(case: NetworkCase, backend: Backend):
    reference, problem = dense(case), case.build(backend)
    e = problem.evaluate()
    assert e.value == pytest.approx(reference.value, rel=1e-12)
    assert e.value == problem.objective.value(problem.params, problem.x, problem.t, problem.weights)
    assert_close(to_numpy(e.outputs).reshape(case.terms, -1), reference.outputs)
    assert_close(flat(e.gradient()), reference.gradient)
    v = case.tangent(backend)
    assert_close(to_numpy(e.jvp(v)).reshape(case.terms, -1), reference.jacobians @ flat(v))


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_take_is_the_evaluation_of_a_slice(case: NetworkCase, backend: Backend):
    problem, n = case.build(backend), (case.shape[0] + 1) // 2
    whole, v = problem.evaluate(), case.tangent(backend)
    weights = None if problem.weights is None else problem.weights[:n]
    fresh = problem.objective.evaluate(
        problem.params, problem.x[:n, ...], problem.t[:n, ...], weights
    )
    cut = whole.take(n)
    assert (cut.scale.terms, cut.scale.examples) == (fresh.scale.terms, fresh.scale.examples)
    assert cut.value == pytest.approx(fresh.value, rel=1e-14)
    assert_close(cut.gradient(), fresh.gradient())
    assert_close(cut.jvp(v), fresh.jvp(v))
    assert whole.take(case.shape[0]) is whole
    fewest = case.fewest
    assert_close(cut.take(fewest).gradient(), whole.take(fewest).gradient())


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_a_duplicated_batch_leaves_the_mean(case: NetworkCase, backend: Backend):
    problem = case.build(backend)
    xp = backend.xp

    def twice(a: Any) -> Any:
        return None if a is None else xp.concat([a, a])

    once = problem.evaluate()
    double = problem.objective.evaluate(
        problem.params, twice(problem.x), twice(problem.t), twice(problem.weights)
    )
    assert double.value == pytest.approx(once.value, rel=1e-14)
    assert_close(double.gradient(), once.gradient())


@pytest.mark.parametrize("case", networks(weighted=False, coupled=False), ids=str)
def test_a_weight_of_two_is_a_duplicate_up_to_m(case: NetworkCase, backend: Backend):
    problem, n = case.build(backend), case.shape[0]
    weighted = problem.objective.evaluate(
        problem.params, problem.x, problem.t, backend.asarray([2.0] + [1.0] * (n - 1))
    )
    xp = backend.xp
    x, t = (xp.concat([a[:1, ...], a]) for a in (problem.x, problem.t))
    duplicated = problem.objective.evaluate(problem.params, x, t)
    # L divides by the number of terms, not by the sum of the weights.
    ratio = duplicated.scale.terms / weighted.scale.terms
    assert weighted.value == pytest.approx(ratio * duplicated.value, rel=1e-14)
    assert_close(weighted.gradient(), trees.scale(ratio, duplicated.gradient()))


@pytest.mark.parametrize("case", NETWORKS, ids=str)
def test_weights_multiply_terms_and_nothing_else(case: NetworkCase, backend: Backend):
    """(1/M) Σ w_n J_nᵀ ∂ℓ_n/∂z, at weights of 0, too: batch statistics do not notice weights."""
    problem, reference, n = case.build(backend), dense(case), case.shape[0]
    weights = np.resize([2.0, 0.0, 0.5], n)
    e = problem.objective.evaluate(problem.params, problem.x, problem.t, backend.asarray(weights))
    w = np.repeat(weights, reference.terms // n)
    j, g = reference.jacobians, reference.output_gradients
    assert_close(flat(e.gradient()), np.einsum("m,mcp,mc->p", w, j, g) / reference.terms)


@pytest.mark.parametrize("case", networks(weighted=False, coupled=False), ids=str)
def test_weights_of_zero_leave_an_example_out(case: NetworkCase, backend: Backend):
    problem, n = case.build(backend), case.shape[0]
    if n == 1:
        return  # refused: see below
    kept = (n + 1) // 2
    e = problem.objective.evaluate(
        problem.params,
        problem.x,
        problem.t,
        backend.asarray([1.0] * kept + [0.0] * (n - kept)),
    )
    assert_close(e.gradient(), trees.scale(kept / n, problem.evaluate().take(kept).gradient()))


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    positions=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_the_mean_over_parts(sizes: list[int], positions: int, seed: int):
    """However a batch is cut up, the weighted mean of the parts is the whole."""
    backend, n = get_backend("numpy", "float64"), sum(sizes)
    lead = (n, positions) if positions else (n,)
    x, t = (Rng(seed, key).normal((*lead, 2), backend) for key in "xt")
    w = Rng(seed, "w").uniform((n,), backend) + 0.1
    net = Sequential(Dense(2, 3), Tanh(), Dense(3, 2))
    params, objective = net.init(Rng(seed), backend), Objective(net, SquaredError())
    whole = objective.evaluate(params, x, t, w)
    value, gradient, start = 0.0, trees.zeros_like(params), 0
    for size in sizes:
        rows = slice(start, start + size)
        part = objective.evaluate(params, x[rows], t[rows], w[rows])
        value += size / n * part.value
        gradient = trees.axpy(size / n, part.gradient(), gradient)
        start += size
    assert whole.value == pytest.approx(value, rel=1e-13)
    assert_close(whole.gradient(), gradient)


def test_the_value_of_single_precision_terms_is_summed_in_double(backend: Backend):
    single = Backend(backend.xp, backend.device, backend.xp.float32)
    n = 200_000
    z = single.asarray(np.full((n, 1), 0.1))
    value = Objective(Identity(), SquaredError()).value((), z, single.zeros((n, 1)))
    # Exactly the one term, rounded to single precision: adding up rounds no more.
    term = float(to_numpy(SquaredError().value(z, single.zeros((n, 1))))[0])
    assert value == pytest.approx(term, rel=1e-13)


def test_backward_keeps_the_vector_axis(backend: Backend, rng: Rng):
    case = NETWORKS[5]
    e = case.build(backend).evaluate()
    v = rng.normal((3, *e.outputs.shape), backend)
    stacked = e.mean_gradient(e.backward(v))
    for k in range(3):
        one = e.mean_gradient(e.backward(v[k, ...]))
        assert_close(trees.tree_map(lambda a, k=k: a[k, ...], stacked), one)
    with pytest.raises(ShapeError, match="vectors: expected shape"):
        e.backward(v[..., :1])
    with pytest.raises(ShapeError, match="vectors: expected shape"):
        e.backward(v[None, ...])


def test_a_network_without_parameters(backend: Backend):
    x = backend.ones((4, 2))
    e = Objective(Sequential(Tanh(), Identity()), SquaredError()).evaluate(((), ()), x, 0.0 * x)
    assert e.gradient() == ((), ())
    np.testing.assert_array_equal(to_numpy(e.jvp(((), ()))), np.zeros((4, 2)))
    assert e.value == pytest.approx(math.tanh(1.0) ** 2)


# ---------------------------------------------------------------------------------------- errors


class Batch:
    """Good arguments, to be spoilt one at a time."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.objective = Objective(Sequential(Dense(3, 4), Tanh(), Dense(4, 2)), SquaredError())
        self.good = {
            "params": self.objective.network.init(Rng(0), backend),
            "x": backend.ones((5, 3)),
            "t": backend.ones((5, 2)),
            "weights": backend.ones((5,)),
        }

    def refused(self, **bad: Any) -> str:
        """The message, the same from `evaluate` and from `value`."""
        messages = []
        for call in (self.objective.evaluate, self.objective.value):
            with pytest.raises(InputError) as error:
                call(**{**self.good, **bad})
            messages.append(str(error.value))
        assert messages[0] == messages[1]
        assert "\n" not in messages[0]
        return messages[0]


@pytest.fixture
def batch(backend: Backend) -> Batch:
    return Batch(backend)


def test_the_good_batch_is_good(batch: Batch):
    assert isinstance(batch.objective.evaluate(**batch.good), Evaluation)


def test_empty_batch(batch: Batch):
    b = batch.backend
    message = batch.refused(x=b.ones((0, 3)), t=b.ones((0, 2)), weights=b.ones((0,)))
    assert message.startswith("x: expected at least one example, got")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 4), "layer 0: Dense(3, 4): expected inputs (N, ..., 3), got (N, 4)"),
        ((3,), "x: expected shape (N, ...) with at least two axes, got"),
        ((), "x: expected shape (N, ...) with at least two axes, got"),
    ],
)
def test_inputs_of_the_wrong_shape(batch: Batch, shape, expected: str):
    assert batch.refused(x=batch.backend.ones(shape)).startswith(expected)


def test_outputs_need_an_axis_of_terms(backend: Backend):
    class Sum(Activation):
        """A number for each example, without an axis of outputs."""

        def value(self, x):
            return backend.xp.sum(x, axis=-1)

        def derivative(self, x, y): ...
        def second_derivative(self, x, y): ...

    objective, x = Objective(Sum(), SquaredError()), backend.ones((4, 2))
    with pytest.raises(ShapeError, match=r"network: expected outputs \(N, \.\.\., C\), got shape"):
        objective.evaluate((), x, x)


@pytest.mark.parametrize("name", ["x", "weights"])
def test_not_floats(batch: Batch, name: str):
    integers = batch.backend.asarray(np.ones(batch.good[name].shape, dtype=int))
    assert batch.refused(**{name: integers}).startswith(
        f"{name}: expected an array of floats, got dtype"
    )
    assert batch.refused(**{name: [[1.0] * 3] * 5}) == f"{name}: expected an array, got list"


@pytest.mark.parametrize("name", ["x", "t", "weights"])
def test_other_precision(batch: Batch, name: str):
    xp = batch.backend.xp
    message = batch.refused(**{name: xp.astype(batch.good[name], xp.float32)})
    assert "expected dtype" in message
    assert name in message or "targets" in message


@pytest.mark.parametrize("name", ["x", "t", "weights"])
def test_other_library(batch: Batch, name: str):
    other = get_backend("array_api_strict" if batch.backend.name == "numpy" else "numpy", "float64")
    message = batch.refused(**{name: other.asarray(to_numpy(batch.good[name]))})
    assert "expected an array of" in message


@pytest.mark.parametrize("name", ["x", "t", "weights"])
def test_other_device(name: str):
    # Moving the data would be easy, and slow without anybody knowing why.
    xp = pytest.importorskip("array_api_strict")
    batch = Batch(get_backend("array_api_strict", "float64", xp.Device("device1")))
    elsewhere = batch.good[name].to_device(xp.Device("CPU_DEVICE"))
    assert "expected device" in batch.refused(**{name: elsewhere})


@pytest.mark.parametrize("name", ["x", "t", "weights"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite(batch: Batch, name: str, bad: float):
    host = np.array(to_numpy(batch.good[name]))
    host.flat[1] = bad
    message = batch.refused(**{name: batch.backend.asarray(host)})
    assert message.endswith(f"expected finite values, got 1 of {host.size} that are NaN or Inf")


@pytest.mark.parametrize("weights", [[-1.0, 1, 1, 1, 1], [0.0] * 5])
def test_weights_out_of_range(batch: Batch, weights):
    message = batch.refused(weights=batch.backend.asarray(weights))
    assert message == "weights: expected values >= 0, not all 0"


@pytest.mark.parametrize("shape", [(4,), (5, 1), (1,), ()])
def test_weights_of_the_wrong_shape(batch: Batch, shape):
    message = batch.refused(weights=batch.backend.ones(shape))
    assert message.startswith("weights: expected shape")


@pytest.mark.parametrize("shape", [(5, 1), (1, 2), (2,), (4, 2)])
def test_targets_of_the_wrong_shape(batch: Batch, shape):
    message = batch.refused(t=batch.backend.ones(shape))
    assert message.startswith("SquaredError targets: expected shape")


def test_parameters(batch: Batch):
    first, _, last = batch.good["params"]
    xp = batch.backend.xp
    for params, expected in (
        ((first, last), "Sequential: expected parameters for 3 layers, got 2"),
        ((first, (), last[:, :3]), "layer 2: Dense(4, 2): expected parameters (2, 5), got"),
        ((first, (), (last,)), "layer 2: Dense(4, 2): expected parameters (2, 5), got tuple"),
        ((first, (), None), "parameter 2: expected an array, got NoneType"),
        ((first, (), xp.astype(last, xp.float32)), "parameter 2: expected dtype"),
    ):
        assert batch.refused(params=params).startswith(expected)


def test_nothing_is_changed_by_a_refused_batch(batch: Batch):
    before = [np.array(to_numpy(leaf)) for leaf in trees.leaves(batch.good["params"])]
    batch.refused(t=batch.backend.ones((5, 1)))
    after = [to_numpy(leaf) for leaf in trees.leaves(batch.good["params"])]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_classes_instead_of_objects():
    with pytest.raises(InputError, match="Objective: expected a Loss as loss, got <class"):
        Objective(Identity(), SquaredError)
    with pytest.raises(InputError, match="Objective: expected a Layer as network, got <class"):
        Objective(Identity, SquaredError())


@pytest.mark.parametrize("n", [0, 6, -1])
def test_take_out_of_range(batch: Batch, n: int):
    with pytest.raises(InputError, match=rf"n: expected 1\.\.5 examples, got {n}"):
        batch.objective.evaluate(**batch.good).take(n)


def test_tangents_in_another_structure(batch: Batch):
    e = batch.objective.evaluate(**batch.good)
    first, _, last = batch.good["params"]
    with pytest.raises(
        ShapeError, match=r"tangent of parameter 2: expected \(2, 5\), got \(2, 3\)"
    ):
        e.jvp((first, (), last[:, :3]))
    with pytest.raises(
        ShapeError, match=r"tangent of parameter 2: expected \(2, 5\), got NoneType"
    ):
        e.jvp((first, (), None))
    with pytest.raises(ShapeError, match="tree at its root: expected a tuple of 3, got a tuple"):
        e.jvp((first, last))


def test_class_numbers_out_of_range_reach_the_user(backend: Backend):
    objective = Objective(Sequential(Flatten(), Dense(4, 3)), SoftmaxCrossEntropy())
    params, x = objective.network.init(Rng(0), backend), backend.ones((2, 2, 2))
    with pytest.raises(TargetError, match=r"expected class numbers 0\.\.2, got 0\.\.3"):
        objective.evaluate(params, x, backend.asarray(np.asarray([0, 3])))


@pytest.mark.parametrize("loss", [SquaredError(), SigmoidCrossEntropy(), SoftmaxCrossEntropy()])
def test_outputs_that_overflow_give_a_value_that_says_so(loss, backend: Backend):
    # Parameters are the optimiser's business: a diverged network has a value that is not finite.
    x = backend.ones((2, 3))
    t = backend.asarray(np.full((2, 2), 0.5))
    value = Objective(Dense(3, 2), loss).value(math.nan * backend.ones((2, 4)), x, t)
    assert math.isnan(value)


def test_scale(backend: Backend):
    scale = Scale(terms=6, examples=3)
    assert scale.positions == 2
    assert scale.row_weights(12) is None
    weighted = Scale(terms=3, examples=3, weights=backend.asarray([1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(to_numpy(weighted.row_weights(6)), [1, 1, 2, 2, 3, 3])
    for s in (scale, weighted):
        with pytest.raises(ShapeError, match="rows: expected a multiple of 3 examples, got 4"):
            s.row_weights(4)
