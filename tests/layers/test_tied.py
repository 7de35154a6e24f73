"""Tied layers and recurrence: structure, merging of uses, errors."""

from __future__ import annotations

import numpy as np
import pytest
from cases import generator, to_backend
from numerics import assert_close, host
from toys import PerExample

from kfac_np import trees
from kfac_np.backend import Backend, DeferredChecks, Rng, get_backend
from kfac_np.errors import CurvatureError, InputError, ShapeError
from kfac_np.layers import (
    BatchNorm,
    Conv,
    Dense,
    Dropout,
    Embedding,
    Flatten,
    Recurrent,
    Sequential,
    Tanh,
    Tied,
    merge_uses,
)
from kfac_np.statistics import (
    AffineStatistics,
    ElementwiseStatistics,
    EmbeddingStatistics,
    GroupedStatistics,
)

NUMPY = get_backend("numpy", "float64")
THREE_TIMES = Tied((Dense(3, 3), Tanh()), order=(0, 1, 0, 1, 0))


def normal(backend: Backend, *shape: int, key: int = 0):
    return Rng(key).child(*shape).normal(shape, backend)


# ------------------------------------------------------------------------------- merged uses


def uses_of(kind: str, backend: Backend):
    """Two uses, with two and three locations."""
    for t in (2, 3):
        g = normal(backend, 2, 4, t, 3)
        if kind == "affine":
            yield AffineStatistics(normal(backend, 4, t, 2), g)
        elif kind == "grouped":
            parts = (AffineStatistics(normal(backend, 4, t, 2, key=i), g) for i in range(2))
            yield GroupedStatistics(tuple(parts))
        elif kind == "embedding":
            indices = generator(f"indices {t}").integers(0, 5, (4, t))
            yield EmbeddingStatistics(backend.asarray(indices), g, 5)
        else:
            yield ElementwiseStatistics(normal(backend, 4, t, 3), g, kind == "scale and shift")


KINDS = ["affine", "grouped", "embedding", "scale and shift", "scale"]


@pytest.mark.parametrize("kind", KINDS)
def test_merged_uses_are_their_sum(kind: str, backend: Backend):
    first, second = uses_of(kind, backend)
    both = merge_uses([first, second])
    assert type(both) is type(first)
    assert both.parameter_shape == first.parameter_shape
    assert (both.num_examples, both.num_vectors) == (4, 2)
    assert_close(both.gradient(), first.gradient() + second.gradient())
    assert_close(both.per_example(), first.per_example() + second.per_example())


def test_one_use_is_left_alone():
    (first, _) = uses_of("affine", NUMPY)
    assert merge_uses([first]) is first


def test_uses_of_several_kinds():
    first, second = (next(uses_of(kind, NUMPY)) for kind in ("affine", "scale"))
    message = "expected one kind of statistics, got AffineStatistics, ElementwiseStatistics"
    with pytest.raises(CurvatureError, match=message):
        merge_uses([first, second])


def test_uses_of_an_unknown_kind():
    use = PerExample(np.zeros((2, 3)), 0)
    with pytest.raises(CurvatureError, match=r"used 2 times, got PerExample"):
        merge_uses([use, use])
    with pytest.raises(InputError, match="expected at least one use, got none"):
        merge_uses([])


def test_patches_of_a_convolution_used_once_stay_folded(backend: Backend):
    conv = Conv(1, 1, (2,), padding="same")
    for order, folded in (((0,), True), ((0, 0), False)):
        layer = Tied((conv,), order)
        params, x = layer.init(Rng(0), backend), normal(backend, 2, 3, 1)
        y, cache = layer.forward(params, x)
        _, (s,) = layer.backward(params, cache, y)
        assert isinstance(s, AffineStatistics)
        assert (s.inputs is s.a) != folded
        assert s.num_locations == 3 * len(order)


# ------------------------------------------------------------------------------------- tied


def test_parameters_are_those_of_the_distinct_layers(backend: Backend):
    params = THREE_TIMES.init(Rng(0), backend)
    assert trees.tree_map(lambda p: p.shape, params) == ((3, 4), ())


def test_the_sum_over_untied_copies_is_the_tied_gradient(backend: Backend):
    copies = Sequential(*(THREE_TIMES.layers[i] for i in THREE_TIMES.order))
    params, x = THREE_TIMES.init(Rng(0), backend), normal(backend, 4, 3)
    untied = tuple(params[i] for i in THREE_TIMES.order)
    y, cache = THREE_TIMES.forward(params, x)
    z, cache_of_copies = copies.forward(untied, x)
    assert np.array_equal(host(y), host(z))
    g = normal(backend, 2, 4, 3)
    dx, (s, nothing) = THREE_TIMES.backward(params, cache, g)
    dx_of_copies, each = copies.backward(untied, cache_of_copies, g)
    assert nothing == ()
    assert_close(dx, dx_of_copies)
    assert s.num_locations == 3
    for quantity in ("gradient", "per_example"):
        first, second, third = (getattr(each[i], quantity)() for i in (0, 2, 4))
        assert_close(getattr(s, quantity)(), first + second + third)
        # What is left if every use overwrites the one before, as hooks on a module do:
        assert np.max(np.abs(host(getattr(s, quantity)() - third))) > 0.1


def test_layers_without_parameters_below_the_first_use(backend: Backend):
    layer = Tied((Tanh(), Dense(3, 3), Flatten()), order=(0, 2, 1, 0, 1))
    params, x = layer.init(Rng(0), backend), normal(backend, 4, 3)
    y, cache = layer.forward(params, x)
    dx, statistics = layer.backward(params, cache, y, wrt_input=False)
    assert dx is None
    assert (statistics[0], statistics[2], statistics[1].num_locations) == ((), (), 2)


def test_every_use_draws_its_own_numbers(backend: Backend):
    x = backend.ones((4, 50))
    for layer in (
        Tied((Dropout(0.5),), (0, 0, 0)),
        Recurrent(Sequential(Dense(51, 50), Dropout(0.5)), 50),
    ):
        params = layer.init(Rng(0), backend)
        if isinstance(layer, Recurrent):
            x = backend.ones((4, 3, 1))
        first, _ = layer.forward(params, x, Rng(1))
        again, _ = layer.forward(params, x, Rng(1))
        assert np.array_equal(host(first), host(again))
        if isinstance(layer, Tied):  # kept by all of three masks, which are not the same
            assert 0.02 < np.mean(host(first) != 0.0) < 0.25
        else:
            zeros = host(first) == 0.0
            assert not np.array_equal(zeros[:, 0], zeros[:, 1])
        # Without random numbers nothing is dropped.
        assert np.all(host(layer.forward(params, x)[0]) != 0.0)


def test_batch_statistics_are_those_of_one_use(backend: Backend):
    layer = Tied((Dense(2, 2), BatchNorm(2)), order=(0, 1, 0))
    assert layer.couples_examples
    params, x = layer.init(Rng(0), backend), normal(backend, 5, 2)
    frozen, y = layer.evaluation(params, x)
    assert not frozen.couples_examples
    assert_close(y, layer.forward(params, x)[0])
    assert_close(frozen.forward(params, x[:2, ...])[0], y[:2, ...])
    for build in (
        lambda: Tied((BatchNorm(2),), (0, 0)),
        lambda: Recurrent(Sequential(Dense(3, 2), BatchNorm(2)), 2),
    ):
        with pytest.raises(InputError, match="no batch statistics, which differ from use to use"):
            build()


def test_inputs_are_checked_by_the_first_use(backend: Backend):
    layer = Tied((Dense(2, 2), Embedding(3, 2)), order=(1, 0, 0))
    params = layer.init(Rng(0), backend)
    assert layer.input_dtype(params[0]) == backend.xp.int64

    def check(label: int) -> None:
        checks = DeferredChecks()
        layer.check_inputs(backend.asarray(np.asarray([[label]])), checks)
        checks.wait()

    check(2)
    with pytest.raises(InputError, match=r"expected integers 0\.\.2"):
        check(3)
    assert (layer.at("0"), layer.at("1"), layer.at("")) == (*layer.layers, layer)


@pytest.mark.parametrize(
    ("layers", "order", "message"),
    [
        ((Tanh, Tanh()), (0, 1), "expected a tuple of layers"),
        ((), (), "expected every layer in the order, got .. for 0 layers"),
        ((Tanh(),), (), "expected every layer in the order"),
        ((Tanh(), Tanh()), (1, 1), "expected every layer in the order"),
        ((Tanh(),), (0, 1), r"expected order to be of 0\.\.0"),
        ((Tanh(),), (-1,), r"expected order to be of 0\.\.0"),
        ((Tanh(),), (False,), r"expected order to be of 0\.\.0"),
    ],
)
def test_wrong_orders(layers, order, message):
    with pytest.raises(InputError, match=f"Tied: {message}"):
        Tied(layers, order)


def test_the_failing_use_is_named(backend: Backend):
    layer = Tied((Dense(3, 2), Tanh()), order=(0, 1, 0))
    match = r"use 2 of layer 0: Dense\(3, 2\): expected inputs \(N, ..., 3\), got \(N, 2\)"
    with pytest.raises(ShapeError, match=match):
        layer.output_shape((3,))
    with pytest.raises(ShapeError, match=match):
        layer.forward(layer.init(Rng(0), backend), backend.ones((1, 3)))
    with pytest.raises(ShapeError, match="Tied: expected parameters for 2 layers, got 3"):
        layer.forward(((), (), ()), backend.ones((1, 3)))


# -------------------------------------------------------------------------------- recurrence


def test_states_by_hand(backend: Backend):
    w = np.asarray([[0.5, 2.0, 1.0]])  # h ← x / 2 + 2 h + 1
    x = backend.asarray(np.asarray([[[2.0], [4.0], [6.0]]]))
    y, _ = Recurrent(Dense(2, 1), 1).forward(to_backend(backend, w), x)
    assert_close(y, np.asarray([[[2.0], [7.0], [18.0]]]))


def test_a_state_does_not_see_what_comes_later(backend: Backend):
    layer = Recurrent(Sequential(Dense(5, 3), Tanh()), 3)
    params, x = layer.init(Rng(0), backend), normal(backend, 2, 4, 2)
    y, cache = layer.forward(params, x)
    g = np.zeros((2, 4, 3))
    g[:, 1] = 1.0
    dx, _ = layer.backward(params, cache, backend.asarray(g))
    assert np.all(host(dx)[:, 2:] == 0.0)
    assert np.all(np.abs(host(dx)[:, :2]) > 0.0)
    shorter, _ = layer.forward(params, x[:, :2, :])
    assert_close(y[:, :2, :], shorter)


@pytest.mark.parametrize(
    ("cell", "d_state", "message"),
    [
        (Tanh, 2, "Recurrent: expected a Layer as cell, got ABCMeta"),
        (Tanh(), 0, "Recurrent d_state: expected an integer > 0, got 0"),
        (Tanh(), 1.0, "Recurrent d_state: expected an integer > 0, got 1.0"),
        (Tanh(), True, "Recurrent d_state: expected an integer > 0, got True"),
    ],
)
def test_wrong_cells(cell, d_state, message):
    with pytest.raises(InputError, match=message):
        Recurrent(cell, d_state)


def test_cells_of_other_sizes(backend: Backend):
    layer = Recurrent(Dense(3, 2), 2)
    params = layer.init(Rng(0), backend)
    with pytest.raises(ShapeError, match=r"Recurrent: Dense\(3, 2\): expected inputs"):
        layer.forward(params, backend.ones((1, 4, 2)))
    with pytest.raises(ShapeError, match=r"expected inputs \(N, S, d\), got \(N, 3\)"):
        layer.forward(params, backend.ones((1, 3)))
    with pytest.raises(ShapeError, match=r"expected a cell with outputs \(1,\), got \(2,\)"):
        Recurrent(Dense(3, 2), 1).output_shape((5, 2))
    assert layer.at("") == Dense(3, 2)


def test_representations():
    for layer in (THREE_TIMES, Recurrent(Sequential(Dense(3, 2), Tanh()), 2)):
        assert eval(repr(layer)) == layer
