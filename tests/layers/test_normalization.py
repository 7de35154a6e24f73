"""Normalisation layers: their statistics, hard inputs, and batch statistics after training."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from cases import generator, host_params, to_backend
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_close

from kfac_np import trees
from kfac_np.backend import Backend, Rng, to_numpy
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers import (
    BatchNorm,
    Conv,
    Dense,
    FixedNorm,
    Flatten,
    GroupNorm,
    Layer,
    LayerNorm,
    Residual,
    RMSNorm,
    Sequential,
    Tanh,
)
from kfac_np.losses import SquaredError
from kfac_np.objective import Objective
from kfac_np.testing import check_layer

ALL = [LayerNorm(4), RMSNorm(4), GroupNorm(2, 4), BatchNorm(4)]
BARE = [
    LayerNorm(4, affine=False),
    RMSNorm(4, affine=False),
    GroupNorm(2, 4, affine=False),
    BatchNorm(4, affine=False),
]
AXES = {"LayerNorm": -1, "RMSNorm": -1, "GroupNorm": (1, 2, 4), "BatchNorm": (0, 1, 2)}


def moments(layer: Layer, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and mean squares of outputs (N, H, W, 4), over what the layer normalises."""
    name = type(layer).__name__
    if name == "GroupNorm":
        y = y.reshape(*y.shape[:-1], 2, 2)
    return y.mean(AXES[name]), (y**2).mean(AXES[name])


@pytest.mark.parametrize("layer", BARE, ids=repr)
def test_means_and_mean_squares(layer: Layer, backend: Backend, rng: Rng):
    x = 3.0 + 2.0 * rng.normal((3, 2, 5, 4), backend)
    y, _ = layer.forward((), x)
    mean, square = moments(layer, to_numpy(y))
    before, variance = moments(layer, to_numpy(x))
    if not isinstance(layer, RMSNorm):
        assert np.max(np.abs(mean)) < 1e-14
        variance = variance - before**2
    np.testing.assert_allclose(square, variance / (variance + 1e-5), rtol=1e-12)  # 1 but for ε


@pytest.mark.parametrize("layer", ALL, ids=repr)
def test_they_begin_as_normalisation_alone(layer: Layer, backend: Backend, rng: Rng):
    x = rng.normal((3, 2, 5, 4), backend)
    params = layer.init(rng, backend)
    assert params.shape == ((1, 4) if isinstance(layer, RMSNorm) else (2, 4))
    bare = BARE[ALL.index(layer)]
    assert bare.init(rng, backend) == ()
    y, _ = layer.forward(params, x)
    z, _ = bare.forward((), x)
    np.testing.assert_array_equal(to_numpy(y), to_numpy(z))


@pytest.mark.parametrize("make", [LayerNorm, RMSNorm, GroupNorm, BatchNorm])
@given(log_scale=st.floats(-2, 3), shift=st.floats(-10, 10))
def test_scale_and_shift_of_the_inputs_are_undone(
    make: type, backend: Backend, log_scale: float, shift: float
):
    """But for ε, which is next to nothing here; RMSNorm undoes a scale alone."""
    arguments = (2, 4) if make is GroupNorm else (4,)
    layer = make(*arguments, epsilon=1e-30, affine=False)
    x = Rng(1).normal((3, 2, 2, 4), backend)
    c = 0.0 if make is RMSNorm else shift
    y, z = (layer.forward((), a)[0] for a in (x, 10.0**log_scale * x + c))
    np.testing.assert_allclose(to_numpy(z), to_numpy(y), atol=1e-11)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-30])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
@pytest.mark.parametrize("layer", [LayerNorm, RMSNorm, GroupNorm, BatchNorm])
def test_constant_inputs_have_no_variance(
    layer: type, value: float, epsilon: float, backend: Backend
):
    """Nothing is divided by 0, in single precision neither; outputs of a constant are finite."""
    arguments = (2, 4) if layer is GroupNorm else (4,)
    module = layer(*arguments, epsilon=epsilon)
    for dtype in (backend.xp.float64, backend.xp.float32):
        b = Backend(backend.xp, backend.device, dtype)
        x, params = b.asarray(np.full((3, 2, 4), value)), module.init(Rng(0), b)
        y, cache = module.forward(params, x)
        dx, statistics = module.backward(params, cache, y)
        dy = module.jvp(params, cache, 0.0 * x, params)
        for array in (y, dx, statistics.gradient(), dy):
            assert np.all(np.isfinite(to_numpy(array)))
        if layer is not RMSNorm:
            np.testing.assert_allclose(to_numpy(y), 0.0, atol=1e-3)


@pytest.mark.parametrize("layer", BARE, ids=repr)
def test_single_precision_far_from_zero(layer: Layer, backend: Backend):
    """A mean of 1000 standard deviations costs the three digits of the inputs, and no more."""
    n = 2000 if isinstance(layer, BatchNorm) else 3
    double = Rng(2).normal((n, 8, 4), backend) + 1000.0
    single = backend.xp.astype(double, backend.xp.float32)
    y, _ = layer.forward((), single)
    expected, _ = layer.forward((), backend.xp.astype(single, backend.xp.float64))
    error = np.max(np.abs(to_numpy(y) - to_numpy(expected)))
    assert error < 1e-4  # of outputs of size 4; means of squares minus squares of means give 0.1


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("make", [LayerNorm, RMSNorm, GroupNorm, BatchNorm])
def test_inputs_whose_squares_overflow(make: type, precision: str, backend: Backend):
    """x̂ does not depend on the unit of x; where even the squares' unit is too small, it is NaN."""
    sizes = (2, 4) if make is GroupNorm else (4,)
    layer, exact = make(*sizes, affine=False), make(*sizes, epsilon=1e-30, affine=False)
    place = Backend(backend.xp, backend.device, getattr(backend.xp, precision))
    single = precision == "float32"
    x = np.random.default_rng(3).standard_normal((5, 3, 4))
    expected, (_, rate) = exact.forward((), x)
    for size in (1e20, 1e25) if single else (1e160, 1e200):
        y, (_, other) = layer.forward((), place.asarray(size * x))
        assert_close(y, expected, 1e-5 if single else 1e-13)
        assert_close(size * place.xp.astype(other, backend.dtype), rate, 1e-5 if single else 1e-13)
    with np.errstate(all="ignore"):
        y, _ = layer.forward((), place.asarray((1e36 if single else 1e300) * x))
    assert np.isnan(to_numpy(y)).all()


def test_statistics_of_many_examples_in_single_precision():
    """Means of means: adding 200 000 numbers one to the other would lose four digits."""
    b = Backend.of(np.zeros(1, dtype=np.float32))
    x = np.random.default_rng(0).uniform(0.0, 1.0, (2000, 100, 2)).astype(np.float32)
    fixed, _ = BatchNorm(2, affine=False).evaluation((), b.asarray(x))
    wide = x.astype(np.float64)
    np.testing.assert_allclose(fixed.mean, wide.mean((0, 1)), rtol=3e-7)
    np.testing.assert_allclose(fixed.rate, (wide.var((0, 1)) + 1e-5) ** -0.5, rtol=2e-6)


def test_group_norm_lies_between_its_relatives(backend: Backend, rng: Rng):
    x = rng.normal((3, 4), backend)
    y, _ = GroupNorm(1, 4, affine=False).forward((), x)
    assert_close(y, LayerNorm(4, affine=False).forward((), x)[0])
    # Groups are channels side by side.
    y, _ = GroupNorm(2, 4, affine=False).forward((), x)
    assert_close(y[:, :2], LayerNorm(2, affine=False).forward((), x[:, :2])[0])


# ------------------------------------------------------------------------------- after training

NETWORKS = [
    BatchNorm(3),
    BatchNorm(3, affine=False),
    Sequential(Dense(3, 4), BatchNorm(4), Tanh(), BatchNorm(4), Dense(4, 2)),
    Residual(Sequential(BatchNorm(3), Tanh()), shortcut=Sequential(Dense(3, 3), BatchNorm(3))),
    Residual(BatchNorm(3)),
]


@pytest.mark.parametrize("network", NETWORKS, ids=repr)
def test_the_form_after_training_keeps_all_laws(network: Layer, backend: Backend):
    seed = generator(repr(network))
    params = to_backend(backend, host_params(network, seed))
    x = backend.asarray(seed.standard_normal((5, 3)))
    fixed, y = network.evaluation(params, x)
    assert_close(y, network.forward(params, x)[0])
    others = backend.asarray(seed.standard_normal((4, 3)))
    check_layer(fixed, params, others, laws=[law for law in LAWS if law != "single_precision"])
    assert trees.tree_map(lambda p: p.shape, fixed.init(Rng(0), backend)) == trees.tree_map(
        lambda p: p.shape, params
    )


LAWS = [
    "init",
    "shape",
    "purity",
    "adjointness",
    "finite_differences",
    "vectors",
    "per_example",
    "coupling",
    "evaluation",
    "take",
    "absent_tangents",
    "backward_jvp",
    "layout",
]


def test_fixed_statistics_are_those_of_the_data(backend: Backend, rng: Rng):
    data = 2.0 + 3.0 * rng.normal((6, 2, 2, 3), backend)
    params = backend.asarray(np.asarray([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]]))
    fixed, _ = BatchNorm(3).evaluation(params, data)
    host, new = to_numpy(data), rng.normal((1, 2, 2, 3), backend)
    mean, deviation = host.mean((0, 1, 2)), np.sqrt(host.var((0, 1, 2)) + 1e-5)
    expected = (to_numpy(new) - mean) / deviation * [1.0, 2.0, 3.0] + [0.0, 1.0, -1.0]
    assert_close(fixed.forward(params, new)[0], expected)


def test_an_objective_after_training(backend: Backend, rng: Rng):
    """The loss of the training batch is the same; an example's does not depend on the others."""
    network = Sequential(Conv(1, 2, (2,)), BatchNorm(2), Tanh(), Flatten(), Dense(6, 1))
    objective = Objective(network, SquaredError())
    params = network.init(rng, backend)
    x, t = rng.normal((5, 4, 1), backend), rng.normal((5, 1), backend)
    after = objective.evaluation(params, x)
    assert after.value(params, x, t) == pytest.approx(objective.value(params, x, t), rel=1e-13)
    each = [after.value(params, x[i : i + 1, ...], t[i : i + 1, ...]) for i in range(5)]
    assert np.mean(each) == pytest.approx(after.value(params, x, t), rel=1e-13)
    one = objective.value(params, x[:1, ...], t[:1, ...])
    assert one != pytest.approx(each[0], rel=1e-3)
    assert after.evaluation(params, x) is after


# ---------------------------------------------------------------------------------------- errors


def test_one_number_has_no_variance(backend: Backend):
    layer = BatchNorm(3)
    params = layer.init(Rng(0), backend)
    message = (
        r"^BatchNorm\(3\): expected at least two values for each channel, got one example without"
    )
    for call in (layer.forward, layer.evaluation):
        with pytest.raises(ShapeError, match=message):
            call(params, backend.ones((1, 3)))
        with pytest.raises(ShapeError, match=message):
            call(params, backend.ones((1, 1, 1, 3)))
        call(params, backend.ones((1, 2, 3)))
    network = Sequential(Dense(3, 3), layer)
    with pytest.raises(ShapeError, match=r"^layer 1: BatchNorm\(3\)"):
        network.forward(network.init(Rng(0), backend), backend.ones((1, 3)))


@pytest.mark.parametrize("layer", ALL, ids=repr)
def test_wrong_shapes_are_named(layer: Layer, backend: Backend):
    params = layer.init(Rng(0), backend)
    name = f"^{re.escape(repr(layer))}"
    inputs = re.escape("expected inputs (N, ..., 4), got (N")
    with pytest.raises(ShapeError, match=rf"{name}: {inputs}, 3\)"):
        layer.forward(params, backend.ones((2, 3)))
    with pytest.raises(ShapeError, match=rf"{name}: expected parameters .*, got tuple"):
        layer.forward((), backend.ones((2, 4)))
    with pytest.raises(ShapeError, match=rf"{name}: expected parameters .*, got \(3, 4\)"):
        layer.forward(backend.ones((3, 4)), backend.ones((2, 4)))
    bare = BARE[ALL.index(layer)]
    with pytest.raises(ShapeError, match=r"expected parameters \(\), got \(2, 4\)"):
        bare.forward(backend.ones((2, 4)), backend.ones((2, 4)))
    with pytest.raises(ShapeError, match=rf"{name}: {inputs}\)"):
        layer.output_shape(())


@pytest.mark.parametrize("epsilon", [0.0, -1e-5, 1e-40, math.nan, math.inf])
@pytest.mark.parametrize("make", [LayerNorm, RMSNorm, BatchNorm])
def test_epsilon_out_of_range(make: type, epsilon: float):
    with pytest.raises(InputError, match=f"{make.__name__}: expected epsilon to be a finite num"):
        make(3, epsilon=epsilon)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "3"])
@pytest.mark.parametrize("make", [LayerNorm, RMSNorm, BatchNorm])
def test_sizes(make: type, size: object):
    with pytest.raises(InputError, match=f"{make.__name__} .*: expected an integer > 0"):
        make(size)


def test_groups_divide_channels():
    with pytest.raises(InputError, match="expected groups to divide channels, got 2 groups for 3"):
        GroupNorm(2, 3)
    with pytest.raises(InputError, match="groups: expected an integer > 0, got 0"):
        GroupNorm(0, 3)


def test_fixed_statistics_of_other_shapes(backend: Backend):
    with pytest.raises(ShapeError, match=r"FixedNorm: expected mean and rate of one shape"):
        FixedNorm(backend.ones((2,)), backend.ones((3,)))


def test_representations_can_be_read():
    layers = [LayerNorm(3), RMSNorm(3, affine=False), GroupNorm(2, 4, 0.1), BatchNorm(2, 1e-3)]
    names = {c.__name__: c for c in (LayerNorm, RMSNorm, GroupNorm, BatchNorm)}
    assert [eval(repr(layer), names) for layer in layers] == layers
    assert repr(BatchNorm(2, 1e-3, affine=False)) == "BatchNorm(2, epsilon=0.001, affine=False)"
    assert repr(FixedNorm(np.zeros(2), np.ones(2))) == "FixedNorm(2)"


def test_a_cache_of_coupled_examples_is_not_cut(backend: Backend):
    network = Sequential(Dense(3, 3), BatchNorm(3))
    params = network.init(Rng(0), backend)
    _, cache = network.forward(params, backend.ones((4, 3)))
    with pytest.raises(InputError, match=r"^BatchNorm\(3\): expected the examples to be forwarded"):
        network.take(cache, slice(0, 2))
