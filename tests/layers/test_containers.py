"""Sequential and Residual: structure, and errors that say where."""

from __future__ import annotations

import pytest

from kfac_np.backend import Backend, Rng
from kfac_np.errors import CurvatureError, InputError, ShapeError
from kfac_np.layers import Dense, Flatten, Residual, Sequential, Tanh
from kfac_np.layers.base import Layer


def test_parameters_are_a_tuple_with_an_entry_a_layer(backend: Backend, rng: Rng):
    net = Sequential(Flatten(), Dense(4, 3), Sequential(Tanh(), Dense(3, 3)), Residual(Dense(3, 3)))
    params = net.init(rng, backend)
    assert [type(p).__name__ for p in (params, params[0], params[2])] == ["tuple"] * 3
    assert (params[0], params[2][0]) == ((), ())
    assert (params[1].shape, params[3].shape) == ((3, 5), (3, 4))


def test_layers_draw_from_streams_of_their_own(backend: Backend, rng: Rng):
    # Lengthening a network leaves the parameters of its first layers as they were.
    short = Sequential(Dense(3, 3), Dense(3, 3)).init(rng.child(), backend)
    long = Sequential(Dense(3, 3), Dense(3, 3), Dense(3, 3)).init(rng.child(), backend)
    xp = backend.xp
    assert all(bool(xp.all(a == b)) for a, b in zip(short, long[:2], strict=True))
    assert not bool(xp.any(long[0][:, :3] == long[1][:, :3]))


def test_representations_can_be_read():
    net = Sequential(Flatten(), Dense(4, 3, bias=False), Residual(Sequential(Tanh(), Dense(3, 3))))
    assert repr(net) == (
        "Sequential(Flatten(), Dense(4, 3, bias=False), "
        "Residual(inner=Sequential(Tanh(), Dense(3, 3))))"
    )
    assert (
        eval(repr(net), {c.__name__: c for c in (Sequential, Flatten, Dense, Residual, Tanh)})
        == net
    )


def test_empty_sequential():
    with pytest.raises(InputError, match="Sequential: expected at least one layer, got none"):
        Sequential()


def test_sequential_of_something_else():
    with pytest.raises(InputError, match="Sequential: expected a Layer at 1, got function"):
        Sequential(Tanh(), lambda x: x)


def test_the_failing_layer_is_named(backend: Backend, rng: Rng):
    net = Sequential(Dense(3, 4), Sequential(Tanh(), Residual(Sequential(Dense(5, 4)))))
    expected = r"layer 1: layer 1: Residual: layer 0: Dense\(5, 4\): expected inputs"
    with pytest.raises(ShapeError, match=expected):
        net.output_shape((3,))
    with pytest.raises(ShapeError, match=expected):
        net.forward(net.init(rng, backend), backend.ones((2, 3)))


def test_residual_needs_equal_shapes(backend: Backend, rng: Rng):
    layer = Residual(Dense(3, 1))
    message = "Residual: expected the inner output shape .*3.*, got .*1"
    with pytest.raises(ShapeError, match=message):
        layer.output_shape((3,))
    # x + y would have been broadcast without a word.
    with pytest.raises(ShapeError, match=message):
        layer.forward(layer.init(rng, backend), backend.ones((2, 3)))


@pytest.mark.parametrize("params", [(), ((),), ((), (), ()), {"0": ()}, None])
def test_parameters_of_another_network(params, backend: Backend):
    with pytest.raises(ShapeError, match="Sequential: expected parameters for 2 layers, got"):
        Sequential(Tanh(), Tanh()).forward(params, backend.ones((2, 3)))


@pytest.mark.parametrize("params", [(), ((),), ((), (), ()), {"0": ()}, None])
def test_parameters_of_another_residual(params, backend: Backend):
    layer = Residual(Tanh(), shortcut=Tanh())
    with pytest.raises(ShapeError, match="Residual: expected parameters for 2 layers, got"):
        layer.forward(params, backend.ones((2, 3)))


def test_owners_of_parameters():
    first, second, third = Dense(3, 3), Dense(3, 3, bias=False), Dense(3, 2)
    net = Sequential(Residual(first), Residual(second, shortcut=Tanh()), third)
    assert [net.at(path) for path in ("0", "1.0", "1.1", "2")] == [first, second, Tanh(), third]
    assert (net.at(""), net.at("1")) == (net, net.layers[1])


def test_nothing_is_carried_below_the_first_parameters(backend: Backend, rng: Rng):
    class Never(Layer):
        """Its backward pass must not be asked for."""

        def init(self, rng, backend):
            return ()

        def output_shape(self, shape):
            return shape

        def forward(self, params, x, rng=None):
            return x, ()

        def backward(self, params, cache, g, wrt_input=True):
            raise AssertionError("nothing needs this derivative")

        def jvp(self, params, cache, dx, dparams):
            return dx

    net = Sequential(Never(), Sequential(Never(), Dense(3, 2)), Tanh())
    params = net.init(rng, backend)
    y, cache = net.forward(params, backend.ones((4, 3)))
    dx, statistics = net.backward(params, cache, y, wrt_input=False)
    assert dx is None
    assert statistics[1][1].gradient().shape == (2, 4)

    bare = Sequential(Never(), Never())
    y, cache = bare.forward(((), ()), backend.ones((4, 3)))
    assert bare.backward(((), ()), cache, y, wrt_input=False) == (None, ((), ()))

    with pytest.raises(CurvatureError, match="expected a layer with backward_jvp for a Hessian"):
        bare.backward_jvp(((), ()), cache, y, None, ((), ()), None)


def test_wrong_inputs_are_refused_before_anything_is_computed():
    # An image where a vector was meant: the whole chain is checked by shapes alone.
    net = Sequential(Dense(3, 4), Tanh(), Dense(4, 2))
    assert net.output_shape((7, 3)) == (7, 2)
    with pytest.raises(ShapeError, match=r"layer 0: .* got \(N, 3, 7\)"):
        net.output_shape((3, 7))
