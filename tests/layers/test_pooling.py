"""Pools: ties, borders, sizes, errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_close, host
from references.networks import apply

from kfac_np.backend import Backend, get_backend
from kfac_np.errors import InputError, ShapeError
from kfac_np.layers import (
    AdaptiveAveragePool,
    AveragePool,
    GlobalAveragePool,
    GlobalMaxPool,
    MaxPool,
    Reshape,
)

NUMPY = get_backend("numpy", "float64")
WINDOWED = [MaxPool, AveragePool]


def test_the_first_of_equal_pixels_wins(backend: Backend):
    x = backend.asarray(np.zeros((1, 4, 4, 1)))
    _, cache = MaxPool((2, 2)).forward((), x)
    dx, _ = MaxPool((2, 2)).backward((), cache, backend.ones((1, 2, 2, 1)))
    expected = np.zeros((4, 4))
    expected[::2, ::2] = 1.0
    assert np.array_equal(host(dx)[0, :, :, 0], expected)


def test_padding_is_never_the_largest(backend: Backend):
    x = backend.asarray(np.full((1, 3, 1), -5.0))
    y, cache = MaxPool((3,), stride=1, padding=2).forward((), x)
    assert np.array_equal(host(y), np.full((1, 5, 1), -5.0))
    dx, _ = MaxPool((3,), stride=1, padding=2).backward((), cache, backend.ones((1, 5, 1)))
    assert np.array_equal(host(dx)[0, :, 0], [3.0, 1.0, 1.0])


def test_zeros_of_the_padding_count_in_a_mean(backend: Backend):
    y, _ = AveragePool((2,), padding=1).forward((), backend.asarray(np.full((1, 2, 1), 6.0)))
    assert_close(y, np.full((1, 2, 1), 3.0))


def test_nan_is_not_lost(backend: Backend):
    # A network that diverges must be seen to do so; comparisons with NaN are all false.
    for place in range(4):
        x = np.zeros((1, 4, 1))
        x[0, place] = np.nan
        for pool in (MaxPool((4,)), GlobalMaxPool()):
            assert np.isnan(host(pool.forward((), backend.asarray(x))[0])).all()


def test_the_winner_is_kept_in_one_byte(backend: Backend):
    if backend.name == "torch":
        pytest.skip("PyTorch's kernels keep the pixel's number")
    x = backend.zeros((1, 1, 257, 1))
    (winners, _) = MaxPool((1, 256)).forward((), x)[1]
    assert [w.dtype for w in winners] == [backend.xp.uint8] * 2
    (winners, _) = MaxPool((1, 257)).forward((), x)[1]
    assert [w.dtype for w in winners] == [backend.xp.uint8, backend.xp.int32]


@given(st.data())
def test_windows_of_any_geometry(data):
    """Values by the definition, and ⟨g, J dx⟩ = ⟨Jᵀ g, dx⟩."""
    axes = data.draw(st.integers(1, 3), "axes")
    window = tuple(data.draw(st.lists(st.integers(1, 3), min_size=axes, max_size=axes), "window"))
    stride = data.draw(st.none() | st.tuples(*[st.integers(1, 3)] * axes), "stride")
    padding = tuple(
        (data.draw(st.integers(-1, k - 1)), data.draw(st.integers(-1, k - 1))) for k in window
    )
    size = tuple(
        max(1, k - low - high, 1 - low, 1 - high, 1 - low - high) + data.draw(st.integers(0, 4))
        for k, (low, high) in zip(window, padding, strict=True)
    )
    seed = np.random.default_rng(0)
    x, dx = seed.standard_normal((2, 2, *size, 2))
    for kind in WINDOWED:
        pool = kind(window, stride, padding)
        y, cache = pool.forward((), x)
        np.testing.assert_allclose(y, apply(pool, (), x), rtol=1e-13, atol=1e-14)
        assert pool.output_shape(x.shape[1:]) == y.shape[1:]
        g = seed.standard_normal((3, *y.shape))
        dy, (back, _) = pool.jvp((), cache, dx, ()), pool.backward((), cache, g)
        np.testing.assert_allclose(
            [np.sum(v * dy) for v in g], [np.sum(b * dx) for b in back], rtol=1e-11, atol=1e-11
        )


@given(st.integers(1, 9), st.integers(1, 9))
def test_every_pixel_is_in_a_bin(n, bins):
    pool = AdaptiveAveragePool((bins,))
    y, cache = pool.forward((), np.ones((1, n, 1)))
    np.testing.assert_allclose(y, np.ones((1, bins, 1)), rtol=1e-14)
    assert np.all(pool.backward((), cache, np.ones((1, bins, 1)))[0] > 0.0)
    if n % bins == 0:  # plain windows then
        x = np.random.default_rng(0).standard_normal((2, n, 3))
        plain, _ = AveragePool((n // bins,)).forward((), x)
        np.testing.assert_allclose(pool.forward((), x)[0], plain, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("kind", WINDOWED)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "expected window to be a positive integer, or a tuple of positive"),
        ({"window": ()}, "expected window to be a positive integer, or a tuple of positive"),
        ({"window": (2, 0)}, "expected window to be a positive integer, or a tuple of positive"),
        ({"window": 2, "stride": (1, 0)}, "expected stride to be a positive integer, or 2 of"),
        ({"window": 2, "stride": (1, 1), "padding": (1,)}, "expected padding to be an integer"),
        ({"window": (2,), "stride": 0}, "expected stride to be a positive integer"),
        ({"window": (2,), "stride": (1, 1)}, "expected stride to be a positive integer"),
        ({"window": (2,), "padding": "same"}, "expected padding to be an integer"),
        ({"window": (2,), "padding": (1, 1)}, "expected padding to be an integer"),
    ],
)
def test_wrong_windows(kind, options, message):
    with pytest.raises(InputError, match=f"{kind.__name__}: {message}"):
        kind(**options)


@pytest.mark.parametrize("kind", [*WINDOWED, AdaptiveAveragePool])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_one_number_is_a_window_for_every_axis(kind, axes: int, backend: Backend):
    x = backend.asarray(np.random.default_rng(0).standard_normal((2, *(6, 4, 5)[:axes], 3)))
    one, each = kind(2), kind((2,) * axes)
    (y, cache), (expected, same) = one.forward((), x), each.forward((), x)
    assert_close(y, expected, 0.0)
    assert one.output_shape(x.shape[1:]) == each.output_shape(x.shape[1:])
    assert_close(one.backward((), cache, y)[0], each.backward((), same, y)[0], 0.0)
    assert_close(one.jvp((), cache, x, ()), each.jvp((), same, x, ()), 0.0)
    with pytest.raises(ShapeError, match=r"Pool\(2\): expected inputs \(N, 1 spatial axes, C\)"):
        one.output_shape((3,))


def test_a_window_for_every_axis_that_another_option_counts():
    assert MaxPool(2, stride=[2, 1]) == MaxPool((2, 2), stride=(2, 1))
    assert AveragePool(3, padding=((1, 1), (0, 0))) == AveragePool((3, 3), padding=((1, 1), (0, 0)))


def test_a_window_of_padding_only_has_no_largest_pixel():
    with pytest.raises(InputError, match=r"MaxPool: expected padding of less than the window"):
        MaxPool((2, 2), padding=2)


@pytest.mark.parametrize("kind", WINDOWED)
def test_windows_that_do_not_fit(kind, backend: Backend):
    with pytest.raises(ShapeError, match=kind.__name__ + r"\(\(3, 2\)\): .* at least \(3, 2\)"):
        kind((3, 2)).output_shape((2, 4, 1))
    with pytest.raises(ShapeError, match=r"expected inputs .N, 2 spatial axes, C., got .N, 4, 1."):
        kind((3, 2)).forward((), backend.zeros((1, 4, 1)))


@pytest.mark.parametrize("pool", [GlobalAveragePool(), GlobalMaxPool()], ids=repr)
@pytest.mark.parametrize("shape", [(3,), (0, 3)])
def test_nothing_to_pool(pool, shape, backend: Backend):
    with pytest.raises(ShapeError, match=r"Pool\(\): expected inputs \(N, ..., C\)"):
        pool.forward((), backend.zeros((2, *shape)))


@pytest.mark.parametrize("shape", [3, (), (0, 2), (-1, -1), (2, -2), (2.0,)])
def test_shapes_that_are_none(shape):
    with pytest.raises(InputError, match="Reshape: expected a tuple of positive integers"):
        Reshape(shape)


def test_numbers_that_do_not_fit_a_shape(backend: Backend):
    with pytest.raises(ShapeError, match=r"Reshape\(\(2, 3\)\): expected 6 numbers, got"):
        Reshape((2, 3)).forward((), backend.zeros((2, 7)))


def test_representations():
    for layer in (MaxPool((2, 2), padding=1), AveragePool((3,), stride=2), Reshape((2, -1))):
        assert eval(repr(layer)) == layer
    assert repr(MaxPool((3, 3), stride=2)) == "MaxPool((3, 3), stride=2)"
