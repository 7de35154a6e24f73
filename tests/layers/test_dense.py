"""The dense layer: its homogeneous matrix, its statistics, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_np.backend import Backend, Rng, get_backend, to_numpy
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers import Dense
from kfac_np.testing import check_layer


def test_bias_is_the_last_column(backend: Backend, rng: Rng):
    W = backend.asarray([[1.0, 2.0, 10.0], [3.0, 4.0, 20.0]])
    y, _ = Dense(2, 2).forward(W, backend.asarray([[1.0, 1.0], [0.0, 0.0]]))
    np.testing.assert_array_equal(to_numpy(y), [[13.0, 27.0], [10.0, 20.0]])
    start = to_numpy(Dense(3, 4).init(rng, backend))
    assert start.shape == (4, 4)
    np.testing.assert_array_equal(start[:, -1], 0.0)
    assert np.all(start[:, :-1] != 0.0)


def test_weights_do_not_depend_on_the_bias(backend: Backend):
    with_bias = to_numpy(Dense(3, 4).init(Rng(5), backend))
    without = to_numpy(Dense(3, 4, bias=False).init(Rng(5), backend))
    np.testing.assert_array_equal(with_bias[:, :-1], without)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "locations"), [((5, 3), 1), ((5, 4, 3), 4), ((5, 2, 4, 3), 8), ((1, 1, 3), 1)]
)
def test_statistics(shape, locations, bias: bool, backend: Backend, rng: Rng):
    layer = Dense(3, 2, bias=bias)
    W = layer.init(rng, backend)
    x, g = rng.normal(shape, backend), rng.normal((4, *shape[:-1], 2), backend)
    _, cache = layer.forward(W, x)
    for vectors, lead in ((g, (4,)), (g[0, ...], ())):
        _, s = layer.backward(W, cache, vectors)
        assert (s.num_examples, s.num_locations) == (shape[0], locations)
        assert s.num_vectors == (4 if lead else 1)
        assert s.a.shape == (shape[0], locations, 3 + bias)
        assert s.g.shape == (*lead, shape[0], locations, 2)
        # Inputs with a 1, and derivatives, exactly as they entered: nothing is divided.
        rows = to_numpy(x).reshape(shape[0], locations, 3)
        np.testing.assert_array_equal(to_numpy(s.a)[..., :3], rows)
        np.testing.assert_array_equal(to_numpy(s.a)[..., 3:], 1.0)
        np.testing.assert_array_equal(to_numpy(s.g).ravel(), to_numpy(vectors).ravel())


@given(
    d_in=st.integers(1, 6),
    d_out=st.integers(1, 6),
    bias=st.booleans(),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_laws_for_all_shapes(d_in: int, d_out: int, bias: bool, shape: list[int]):
    backend = get_backend("numpy", "float64")
    layer = Dense(d_in, d_out, bias=bias)
    W = Rng(1).normal((d_out, d_in + bias), backend)
    check_layer(layer, W, Rng(2).normal((*shape, d_in), backend))


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (-1, 2), (2.0, 1), ("3", 1)])
def test_sizes(sizes):
    with pytest.raises(InputError, match=r"Dense d_(in|out): expected an integer > 0"):
        Dense(*sizes)


def test_wrong_shapes_are_named(backend: Backend):
    layer, x = Dense(3, 2), backend.ones((5, 4))
    with pytest.raises(ShapeError) as error:
        layer.forward(backend.ones((2, 4)), x)
    assert str(error.value) == "Dense(3, 2): expected inputs (N, ..., 3), got (N, 4)"
    with pytest.raises(ShapeError, match=r"^Dense\(3, 2\): expected parameters \(2, 4\), got"):
        layer.forward(backend.ones((2, 3)), x[:, :3])
    with pytest.raises(ShapeError, match=r"Dense\(3, 2, bias=False\): .* got \(N\)"):
        Dense(3, 2, bias=False).output_shape(())


def test_initializer_of_the_wrong_shape(backend: Backend, rng: Rng):
    layer = Dense(3, 2, initializer=lambda rng, fan_in, fan_out, b: b.ones((fan_in, fan_out)))
    with pytest.raises(ShapeError, match=r"Dense\(3, 2\): expected the initializer to return"):
        layer.init(rng, backend)
