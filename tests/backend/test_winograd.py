"""Cook and Toom's convolution against products with unfolded patches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_close

from kfac_np.backend import Geometry, Patches, transposed_product
from kfac_np.backend.numpy_kernels import winograd
from kfac_np.backend.unfolding import Unfolding, transposed_product_generic

HostArray = np.ndarray[Any, Any]
TOLERANCE = {np.float32: 1e-5, np.float64: 1e-13}


@pytest.mark.parametrize("taps", [3, 4, 5])
def test_transforms_are_a_correlation(taps: int):
    a, g, b = winograd.transforms(taps)
    assert a.shape == (4, taps + 3)
    assert np.max(np.abs(b)) == 1.0
    rng = np.random.default_rng(taps)
    x, w = rng.standard_normal(taps + 3), rng.standard_normal(taps)
    assert_close(a @ ((g @ w) * (b @ x)), np.correlate(x, w, "valid"), 1e-13)


@st.composite
def geometries(draw: Any) -> tuple[HostArray, Geometry]:
    """Two or three axes, dilation of all but the last one, outputs that are no whole tiles."""
    lead = draw(st.integers(1, 2))
    kernel = (*(draw(st.integers(1, 3)) for _ in range(lead)), draw(st.integers(3, 5)))
    dilation = (*(draw(st.integers(1, 2)) for _ in range(lead)), 1)
    size = [d * (k - 1) + draw(st.integers(1, 4)) for k, d in zip(kernel, dilation, strict=True)]
    size[-1] += draw(st.integers(0, 7))
    shape = (draw(st.integers(1, 4)), *size, draw(st.integers(1, 3)))
    x = np.random.default_rng(0).standard_normal(shape)
    return x, Geometry(kernel, (1,) * len(kernel), dilation, ((0, 0),) * len(kernel))


@given(
    drawn=geometries(),
    ones=st.booleans(),
    columns=st.integers(1, 3),
    dtype=st.sampled_from([np.float32, np.float64]),
    budget=st.sampled_from([1, 3000, 2**30]),
)
def test_it_is_the_product_with_patches(
    drawn: tuple[HostArray, Geometry], ones: bool, columns: int, dtype: Any, budget: int
):
    x, geometry = drawn[0].astype(dtype), drawn[1]
    p, rng = Patches(x, geometry, ones, budget), np.random.default_rng(1)
    m = rng.standard_normal((p.shape[2], columns)).astype(dtype)
    g = rng.standard_normal((2, *p.shape[:2], columns)).astype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kfac_np.backend.numpy_kernels.engine.FEWEST_LOCATIONS", 0)
        patch.setattr("kfac_np.backend.numpy_kernels.engine.MOST_CHANNELS", 0)
        patch.setattr(winograd, "LARGEST_SHARE", np.inf)
        for found, expected in (
            (p.product(m), Unfolding(p).product(m)),
            (p.product(m.T.copy().T), Unfolding(p).product(m)),
            (p.gradient(g), Unfolding(p).gradient(g)),
            (p.gradient(g[0]), Unfolding(p).gradient(g[0])),
            (p.gradient(g[::-1, ..., ::-1]), Unfolding(p).gradient(g[::-1, ..., ::-1])),
        ):
            assert found.dtype == dtype
            assert_close(found, expected, TOLERANCE[dtype])


@given(drawn=geometries())
def test_views_of_any_layout(drawn: tuple[HostArray, Geometry]):
    x, geometry = drawn
    wide = np.concatenate([x, -x], axis=-1)
    p = Patches(x, geometry, False, 2**20)
    m = np.random.default_rng(1).standard_normal((p.shape[2], 2))
    g = np.random.default_rng(2).standard_normal((len(x), *p.out, 2))
    for view in (wide[..., : x.shape[-1]], np.asfortranarray(x), np.flip(np.flip(x).copy())):
        y = np.empty_like(g)
        winograd.product(view, geometry, m, None, y, 2**20)
        assert_close(y, Unfolding(p).product(m), 1e-13)
        found = winograd.gradient(view, geometry, np.asfortranarray(g), 2**20)
        assert_close(found, Unfolding(p).gradient(g.reshape(*p.shape[:2], 2)), 1e-13)


@pytest.mark.parametrize("taps", [3, 5])
def test_few_digits_are_lost_in_single_precision(taps: int):
    """At the sizes where it is used, for inputs of mean 0 and for what a ReLU leaves of them."""
    rng = np.random.default_rng(0)
    geometry = Geometry((taps, taps), (1, 1), (1, 1), ((0, 0), (0, 0)))
    for f in (np.asarray, lambda x: np.maximum(x, 0.0)):
        x = f(rng.standard_normal((8, 20, 20, 48))).astype(np.float32)
        p = Patches(x, geometry, True, 2**23)
        m = rng.standard_normal((p.shape[2], 64)).astype(np.float32)
        g = rng.standard_normal((*p.shape[:2], 64)).astype(np.float32)
        assert winograd.pays(x, geometry, 64)
        exact = Patches(x.astype(float), geometry, True, 2**23)
        for found, twin, expected in (
            (p.product(m), Unfolding(p).product(m), Unfolding(exact).product(m.astype(float))),
            (p.gradient(g), Unfolding(p).gradient(g), Unfolding(exact).gradient(g.astype(float))),
        ):
            error, other = (np.sqrt(np.mean((v - expected) ** 2)) for v in (found, twin))
            assert error <= 4.0 * other + 1e-6 * np.sqrt(np.mean(expected**2))
            assert error <= 2e-6 * np.sqrt(np.mean(expected**2))


def test_the_way_back_of_a_convolution_takes_it():
    rng = np.random.default_rng(0)
    geometry = Geometry((5, 5), (1, 1), (1, 1), ((2, 2), (2, 2)))
    g, w = rng.standard_normal((2, 9, 10, 32)), rng.standard_normal((32, 25 * 24))
    assert winograd.pays(g, geometry, 24)
    arguments = g, w, geometry, (9, 10), 2**23
    assert_close(transposed_product(*arguments), transposed_product_generic(*arguments), 1e-13)


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "dilation", "dtype"),
    [
        ((20, 20, 3), (5, 5), (1, 1), (1, 1), "f4"),  # few channels
        ((20, 20, 32), (5, 2), (1, 1), (1, 1), "f4"),  # few taps
        ((20, 20, 32), (5, 6), (1, 1), (1, 1), "f4"),  # many taps: digits
        ((20, 20, 32), (5, 5), (1, 2), (1, 1), "f4"),
        ((20, 20, 32), (5, 5), (2, 1), (1, 1), "f4"),
        ((20, 20, 32), (5, 5), (1, 1), (1, 2), "f4"),
        ((20, 20, 32), (5, 5), (1, 1), (1, 1), "f2"),
        ((8, 999, 32), (5, 5), (1, 1), (1, 1), "f4"),  # transforms of a long axis
        ((20, 32), (5,), (1,), (1,), "f4"),
    ],
)
def test_where_it_is_not_taken(
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    dtype: str,
):
    geometry = Geometry(kernel, stride, dilation, ((0, 0),) * len(kernel))
    assert not winograd.pays(np.empty((1, *shape), dtype=dtype), geometry, 32)
