"""Max pooling axis by axis against its definition, and the fast kernels against their twins."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_close, host

from kfac_np.backend import Backend, Geometry, get_backend, pad
from kfac_np.backend.max_pooling import (
    max_pool,
    max_pool_generic,
    max_pool_tangent,
    max_pool_tangent_generic,
    max_pool_transpose,
    max_pool_transpose_generic,
)
from kfac_np.backend.numpy_kernels import window_maxima

HostArray = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Drawn:
    """Windows, and an input that they fit into."""

    geometry: Geometry
    x: HostArray
    g: HostArray

    @property
    def size(self) -> tuple[int, ...]:
        return self.x.shape[1:-1]


@st.composite
def pools(draw: Any) -> Drawn:
    """One to three axes, any stride, pixels put on and cut off, and equal pixels."""
    axes = draw(st.integers(1, 3))
    kernel, stride = (tuple(draw(st.integers(1, 4)) for _ in range(axes)) for _ in range(2))
    padding = tuple((draw(st.integers(-2, k - 1)), draw(st.integers(-2, k - 1))) for k in kernel)
    size = [
        max(1, k - low - high, 1 - low, 1 - high, 1 - low - high) + draw(st.integers(0, 5))
        for k, (low, high) in zip(kernel, padding, strict=True)
    ]
    geometry = Geometry(kernel, stride, (1,) * axes, padding)
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    x = rng.integers(-2, 3, (draw(st.integers(1, 4)), *size, 2)).astype(np.float64)
    g = rng.standard_normal((len(x), *geometry.output_size(tuple(size)), 2))
    return Drawn(geometry, x, g)


def definition(drawn: Drawn) -> tuple[HostArray, HostArray]:
    """Largest pixels window by window, and g carried to the first of them in row-major order."""
    geometry, x = drawn.geometry, pad(drawn.x, drawn.geometry.padding, -np.inf)
    y, dx = np.empty_like(drawn.g), np.zeros_like(x)
    for location in itertools.product(*map(range, y.shape[1:-1])):
        window = tuple(
            slice(t * s, t * s + k)
            for t, s, k in zip(location, geometry.stride, geometry.kernel, strict=True)
        )
        for n, c in np.ndindex(len(x), x.shape[-1]):
            pixels = x[(n, *window, c)]
            first = np.unravel_index(np.argmax(pixels), pixels.shape)
            y[(n, *location, c)] = pixels[first]
            dx[(n, *window, c)][first] += drawn.g[(n, *location, c)]
    return y, pad(dx, tuple((-low, -high) for low, high in geometry.padding))


@given(drawn=pools())
def test_pooling_is_its_definition(backend: Backend, drawn: Drawn):
    expected, carried = definition(drawn)
    x, g = backend.asarray(drawn.x), backend.asarray(drawn.g)
    for pool, transpose, tangent in (
        (max_pool, max_pool_transpose, max_pool_tangent),
        (max_pool_generic, max_pool_transpose_generic, max_pool_tangent_generic),
    ):
        y, winners = pool(x, drawn.geometry)
        assert np.array_equal(host(y), expected)
        dx = transpose(g, winners, drawn.geometry, drawn.size)
        assert_close(dx, carried, 1e-14)
        assert np.array_equal(host(tangent(x, winners, drawn.geometry)), expected)
        several = transpose(backend.xp.stack([g, -g, 2 * g]), winners, drawn.geometry, drawn.size)
        assert_close(several, np.stack([carried, -carried, 2 * carried]), 1e-14)


@given(
    drawn=pools(), cache=st.sampled_from([1, 500, 2**20]), dtype=st.sampled_from(["f4", "f8", "f2"])
)
def test_both_kernels_agree(drawn: Drawn, cache: int, dtype: str):
    """Whatever the chunks, the precision and the layout; winners, too."""
    wide = np.stack([drawn.x, drawn.x], axis=-1).astype(dtype)
    g = drawn.g.astype(dtype)
    arguments = drawn.geometry, drawn.size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_maxima, "CACHE_BYTES", cache)
        for x in (wide[..., 0], np.flip(wide[..., 0]), np.asfortranarray(wide[..., 0])):
            (y, winners), (z, others) = (f(x, drawn.geometry) for f in (max_pool, max_pool_generic))
            assert y.dtype == z.dtype == np.dtype(dtype)
            assert np.array_equal(y, z)
            for winner, other in zip(winners, others, strict=True):
                assert winner.dtype == other.dtype == np.uint8
                assert np.array_equal(winner, other)
            dx = max_pool_transpose(g, winners, *arguments)
            assert dx.dtype == np.dtype(dtype)
            twin = max_pool_transpose_generic(g, winners, *arguments)
            assert_close(dx, twin, {"f2": 1e-2, "f4": 1e-6, "f8": 1e-14}[dtype])
            tangents = (
                f(x, winners, drawn.geometry) for f in (max_pool_tangent, max_pool_tangent_generic)
            )
            assert np.array_equal(*tangents)
            none = max_pool_transpose(g[None][:0], winners, *arguments)
            assert none.shape == (0, *drawn.x.shape)


def test_no_input_is_written_to():
    x = np.random.default_rng(0).standard_normal((2, 5, 5, 1))
    for kernel in ((1, 1), (2, 2)):
        geometry = Geometry(kernel, (1, 1), (1, 1), ((0, 0), (0, 0)))
        y, winners = max_pool(x, geometry)
        assert not np.shares_memory(x, y)
        g = np.ones_like(y)
        dx = max_pool_transpose(g, winners, geometry, (5, 5))
        dx += 1.0
        assert (g == 1.0).all()


def test_windows_of_more_than_a_byte():
    backend = get_backend("numpy", "float64")
    x = backend.asarray(np.arange(300.0)[None, :, None] % 298)
    y, (winner,) = max_pool(x, Geometry((300,), (1,), (1,), ((0, 0),)))
    assert (float(y[0, 0, 0]), int(winner[0, 0, 0])) == (297.0, 297)
