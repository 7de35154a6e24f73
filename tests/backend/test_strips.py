"""Products by strips against those by unfolding: every geometry, dtype and way of cutting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_close, host
from test_patches import Drawn, geometries

from kfac_np.backend import Backend, Geometry, Patches, get_backend, pad
from kfac_np.backend.numpy_kernels import engine, lags, strips
from kfac_np.backend.unfolding import Unfolding

TOLERANCE = {"float64": 1e-13, "float32": 1e-5}


def drawn_patches(drawn: Drawn, backend: Backend, ones: bool, budget: int) -> Patches:
    return Patches(backend.asarray(drawn.x), drawn.geometry, ones, budget)


@given(
    drawn=geometries(),
    ones=st.booleans(),
    dtype=st.sampled_from(["float32", "float64"]),
    budget=st.sampled_from([1, 1000, 2**30]),
    largest=st.sampled_from([1, 20, 10**6]),
    columns=st.integers(1, 3),
    few=st.sampled_from([0, 3]),
)
def test_both_ways_agree(
    drawn: Drawn, ones: bool, dtype: str, budget: int, largest: int, columns: int, few: int
):
    """Strips however few locations there are, in pieces of any size, one chunk or many; columns."""
    backend = get_backend("numpy", dtype)
    p = drawn_patches(drawn, backend, ones, budget)
    rng = np.random.default_rng(1)
    m = backend.asarray(rng.standard_normal((p.shape[2], columns)))
    g = backend.asarray(rng.standard_normal((*p.shape[:2], columns)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "FEWEST_LOCATIONS", 0)
        patch.setattr(engine, "MOST_CHANNELS", few)
        patch.setattr(strips, "SMALL_PRODUCT", largest)
        for found, expected in (
            (p.product(m), Unfolding(p).product(m)),
            (p.product(m.T.copy().T), Unfolding(p).product(m)),
            (p.gradient(g), Unfolding(p).gradient(g)),
            (p.gradient(np.stack([g, 2 * g])), Unfolding(p).gradient(np.stack([g, 2 * g]))),
        ):
            assert found.dtype == backend.dtype
            assert_close(found, expected, TOLERANCE[dtype])
        none = p.gradient(g[None][:0])
        assert none.shape == Unfolding(p).gradient(g[None][:0]).shape == (0, columns, p.shape[2])


@given(drawn=geometries(), ones=st.booleans())
def test_every_backend_agrees_with_the_definition(backend: Backend, drawn: Drawn, ones: bool):
    p = drawn_patches(drawn, backend, ones, 1000)
    rows = host(p.array())
    rng = np.random.default_rng(1)
    m, g = rng.standard_normal((p.shape[2], 2)), rng.standard_normal((3, *p.shape[:2], 2))
    assert_close(p.product(backend.asarray(m)), (rows @ m).reshape(len(rows), *p.out, 2), 1e-13)
    gradients = np.einsum("kntm,ntd->kmd", g, rows)
    assert_close(p.gradient(backend.asarray(g)), gradients, 1e-12)
    assert_close(p.gradient(backend.asarray(g[0])), gradients[0], 1e-12)


@given(drawn=geometries())
def test_views_of_any_layout(drawn: Drawn):
    """What a grouped convolution hands over: some channels, of inputs and of derivatives."""
    x = pad(drawn.x, drawn.geometry.padding)
    wide = np.concatenate([x, -x, x], axis=-1)
    c = x.shape[-1]
    whole = Patches(drawn.x, drawn.geometry, False, 2**20)
    g = np.random.default_rng(1).standard_normal((*whole.shape[:2], 4))
    expected = Unfolding(whole).gradient(g[..., 1:3])
    for view in (wide[..., 2 * c :], np.asfortranarray(x), np.flip(np.flip(x).copy())):
        locations = g[..., 1:3].reshape(len(x), *whole.out, 2)
        assert_close(strips.gradient(view, drawn.geometry, locations, 2**20), expected, 1e-12)


@given(
    drawn=geometries(),
    ones=st.booleans(),
    dtype=st.sampled_from(["float32", "float64"]),
    budget=st.sampled_from([1, 1000, 2**30]),
    largest=st.sampled_from([1, 100, 10**6]),
    channels=st.sampled_from([1, 16]),
)
def test_second_moments_agree(
    drawn: Drawn, ones: bool, dtype: str, budget: int, largest: int, channels: int
):
    """The fast ones, by strips or by pixels, exist for two axes; others go to the twin."""
    p = drawn_patches(drawn, get_backend("numpy", dtype), ones, budget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "FEWEST_LOCATIONS", 0)
        patch.setattr(strips, "SMALL_PRODUCT", largest)
        patch.setattr(lags, "SMALL_PRODUCT", largest)
        patch.setattr(lags, "FEWEST_CHANNELS", channels)
        found, expected = p.second_moment(), Unfolding(p).second_moment()
    assert found.dtype == np.dtype(dtype)
    assert np.array_equal(found, found.T)
    assert_close(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("border", [0, 1, 2, 4, 9])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [((2, 1), (1, 1), (1, 1)), ((5, 3), (1, 2), (1, 1)), ((3, 4), (1, 1), (3, 2))],
)
@pytest.mark.parametrize("budget", [2**30, 5000])
@pytest.mark.parametrize("channels", [1, 16], ids=["pixels", "strips"])
def test_second_moments_of_larger_images(
    border: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: Any,
    budget: int,
    channels: int,
    monkeypatch: pytest.MonkeyPatch,
):
    """Rows of zeros at the border, of all examples or of some, and rows that only look so."""
    monkeypatch.setattr(lags, "FEWEST_CHANNELS", channels)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 19, 17, 2))
    x[:, :border] = x[:, 19 - border :] = x[:, :, : border // 2] = 0.0
    x[1, 3:5] = x[4, 0] = 0.0
    for y in (x, np.abs(x) - x):
        p = Patches(y, Geometry(kernel, stride, dilation, ((0, 0), (0, 0))), True, budget)
        assert_close(p.second_moment(), Unfolding(p).second_moment(), 1e-13)


@pytest.mark.parametrize("channels", [1, 16], ids=["pixels", "strips"])
def test_nothing_but_zeros(channels: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lags, "FEWEST_CHANNELS", channels)
    p = Patches(np.zeros((2, 9, 9, 1)), Geometry((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1))), True, 1)
    expected = np.zeros((10, 10))
    expected[-1, -1] = 2 * 9 * 9
    assert np.array_equal(p.second_moment(), expected)


@given(drawn=geometries(), ones=st.booleans())
def test_second_moments_on_every_backend(backend: Backend, drawn: Drawn, ones: bool):
    p = drawn_patches(drawn, backend, ones, 1000)
    rows = host(p.array()).reshape(-1, p.shape[2])
    assert_close(p.second_moment(), rows.T @ rows, 1e-13)


def test_pieces_are_small_and_of_one_length():
    def split(*size: int, kernel: tuple[int, ...] = (1, 3), stride: int = 1) -> tuple[int, ...]:
        x: Any = np.zeros((1, *size, 1))
        ones = (1,) * len(size)
        geometry = Geometry(kernel, (stride, *ones[1:]), ones, ((0, 0),) * len(size))
        return strips.Strips.of(x, geometry).split(10**4)

    # 10^6 multiplications are 33 rows of 3 numbers times 10^4 columns.
    assert split(16, 18) == (8, 32)
    assert split(3, 13) == (1, 33)
    assert split(31, 33) == (31, 31)
    assert split(1, 69) == (1, 67)  # a prime number of locations stays whole
    assert split(9, 18, stride=2) == (5, 16)  # rows that do not lie behind one another
    assert split(2, 4, 18, kernel=(1, 1, 3)) == (2, 2, 32)
