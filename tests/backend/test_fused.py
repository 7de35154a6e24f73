"""Kernels and reductions against their twins, over odd shapes, strides and both precisions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kfac_np.backend import Backend, fused, reductions, to_numpy

ENDS = [0.0, -0.0, 1e-30, 40.0, -40.0, 1e4, -1e4]


def numbers(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    x = 3.0 * np.random.default_rng(seed).standard_normal(shape)
    x.ravel()[: len(ENDS)] = ENDS[: x.size]
    return x


def arrays(backend: Backend, dtype: str, layout: str) -> tuple[Any, Any]:
    """Two arrays of one shape, laid out in memory in several ways."""
    x, y = (backend.asarray(numbers((6, 14), k), getattr(backend.xp, dtype)) for k in (0, 1))
    whole = slice(None)
    views: dict[str, Callable[[Any], Any]] = {
        "rows": lambda a: a,
        "columns": lambda a: a.T,
        "strided": lambda a: a[::2, 1::3],
        "one row": lambda a: a[2, whole],
        "empty": lambda a: a[:0, whole],
        "scalar": lambda a: backend.xp.reshape(a[1, 3], ()),
    }
    return views[layout](x), views[layout](y)


@pytest.fixture(params=["rows", "columns", "strided", "one row", "empty", "scalar"])
def pair(request, backend: Backend, dtype: str):
    return arrays(backend, dtype, request.param)


@pytest.fixture(params=["float32", "float64"])
def dtype(request) -> str:
    return request.param


def require_equal(fast: Any, generic: Any, like: Any):
    assert Backend.of(fast) == Backend.of(generic) == Backend.of(like)
    assert fast.shape == generic.shape
    size = 4.0 * float(np.finfo(to_numpy(like).dtype).eps)
    np.testing.assert_allclose(to_numpy(fast), to_numpy(generic), rtol=size, atol=size)


def test_functions(pair):
    x, _ = pair
    before = np.array(to_numpy(x))
    for fast, generic in (
        (fused.logistic, fused.logistic_generic),
        (fused.softplus, fused.softplus_generic),
        (fused.rectify, fused.rectify_generic),
    ):
        require_equal(fast(x), generic(x), x)
    np.testing.assert_array_equal(to_numpy(x), before)


def test_are_finite(pair, backend: Backend):
    x, _ = pair
    assert bool(reductions.are_finite(x)) is bool(reductions.are_finite_generic(x)) is True
    for bad in (np.nan, np.inf, -np.inf):
        one = backend.xp.where(x == x[(-1,) * x.ndim], bad, x) if 0 not in x.shape else x
        expected = 0 in x.shape
        for finite in (reductions.are_finite, reductions.are_finite_generic):
            assert bool(finite(one)) is bool(finite(x, one, x)) is expected
    huge = backend.xp.full_like(x, float(backend.xp.finfo(x.dtype).max))  # sums of it are Inf
    assert bool(reductions.are_finite(huge, -huge, huge))


def test_inner(pair, backend: Backend):
    """Of one pair, and of several: the sum over all of them."""
    x, y = pair
    size = 1e-14 if "64" in str(x.dtype) else 1e-5
    for xs, ys in (([x], [y]), ([x, y, x], [y, y, x])):
        expected = sum(np.vdot(*(to_numpy(v).astype(float) for v in p)) for p in zip(xs, ys))  # noqa: B905
        scale = sum(np.sum(np.abs(to_numpy(a) * to_numpy(b))) for a, b in zip(xs, ys))  # noqa: B905
        for found in (reductions.inner(xs, ys), reductions.inner_generic(xs, ys)):
            assert found.shape == ()
            assert found.dtype == x.dtype
            assert abs(float(found) - expected) <= size * scale


def test_sum_of_squares(pair, backend: Backend):
    """In double precision, of numbers whose squares overflow in single, too; NaN and Inf stay."""
    x, y = pair
    for xs in ([x], [x, y], [1e15 * x, 1e25 * y]):
        found = reductions.sum_of_squares(xs)
        assert found.shape == ()
        assert found.dtype == backend.xp.float64
        expected = sum(np.sum(to_numpy(v).astype(float) ** 2) for v in xs)
        assert float(found) == pytest.approx(expected, rel=1e-5)
    if 0 not in x.shape:
        infinite = backend.xp.full_like(x, np.inf)
        assert not np.isfinite(float(reductions.sum_of_squares([y, infinite])))


def test_clip(pair, backend: Backend):
    x, _ = pair
    for low, high in ((-1.0, None), (None, 0.5), (-1.0, 0.5)):
        require_equal(fused.clip(x, low, high), backend.xp.clip(x, min=low, max=high), x)
    nothing = backend.asarray(np.asarray([np.nan]))
    assert np.isnan(to_numpy(fused.clip(nothing, 0.0, 1.0)))


@pytest.mark.parametrize("name", ["tanh_vjp", "logistic_vjp", "leaky_vjp"])
def test_vjps(name: str, pair, backend: Backend):
    """Also of several derivatives at once; nothing that is given is written to."""
    fast, generic = getattr(fused, name), getattr(fused, f"{name}_generic")
    g, x = pair
    y = backend.xp.tanh(x)
    several = backend.xp.stack([g, 2.0 * g])
    before = [np.array(to_numpy(a)) for a in (g, y, several)]
    for slope in ((), (0.25,)) if name == "leaky_vjp" else ((),):
        require_equal(fast(g, y, *slope), generic(g, y, *slope), g)
        each = fast(several, y, *slope)
        require_equal(each, generic(several, y, *slope), g)
        require_equal(each[1, ...], 2.0 * fast(g, y, *slope), g)
    for a, b in zip((g, y, several), before, strict=True):
        np.testing.assert_array_equal(to_numpy(a), b)


def test_vjps_are_derivatives(backend: Backend):
    x = numbers((5, 4))
    g, y = numbers((5, 4), 1), np.tanh(x)
    sent = [backend.asarray(a) for a in (g, x, y)]
    close = {"rtol": 1e-14, "atol": 1e-14}
    found = to_numpy(fused.tanh_vjp(sent[0], sent[2]))
    np.testing.assert_allclose(found, g * (1 - y**2), **close)
    found = to_numpy(fused.logistic_vjp(sent[0], sent[2]))
    np.testing.assert_allclose(found, g * (y - y**2), **close)
    found = to_numpy(fused.leaky_vjp(*sent[:2], 0.25))
    np.testing.assert_allclose(found, np.where(x > 0, g, g / 4), **close)


def test_sigmoid_cross_entropy(pair, backend: Backend):
    z, t = pair
    t = backend.xp.clip(t, min=0.0, max=1.0)
    fast, generic = fused.sigmoid_cross_entropy, fused.sigmoid_cross_entropy_generic
    require_equal(fast(z, t), generic(z, t), z)


def test_small_losses_keep_their_digits(backend: Backend):
    z = np.asarray([30.0, -30.0, 80.0, 1e4, -1e4])
    t = np.asarray([1.0, 0.0, 1.0, 1.0, 0.0])
    found = to_numpy(fused.sigmoid_cross_entropy(backend.asarray(z), backend.asarray(t)))
    np.testing.assert_allclose(found, np.log1p(np.exp(-np.abs(z))), rtol=1e-14)


def test_bernoulli(pair, backend: Backend):
    p, _ = pair
    p = backend.xp.clip(0.5 + 0.2 * p, min=0.0, max=1.0)
    draw = np.random.default_rng(3)
    bits = draw.integers(-(2**15), 2**15, p.shape).astype(np.int16)
    coarse = backend.asarray(bits)
    fine = backend.asarray(2.0**15 + draw.integers(0, 256, (*p.shape[:-1], 1)[-p.ndim :]) / 256)
    fine = backend.xp.astype(fine, p.dtype) if p.ndim else backend.xp.astype(fine[0], p.dtype)
    fast = fused.bernoulli(p, coarse, fine)
    np.testing.assert_array_equal(
        to_numpy(fast), to_numpy(fused.bernoulli_generic(p, coarse, fine))
    )
    assert Backend.of(fast) == Backend.of(p)


def test_combine(pair, backend: Backend):
    x, y = pair
    before = [np.array(to_numpy(v)) for v in pair]
    for a, b in ((0.75, 0.25), (-2.0, 1.0), (1.0, 0.0)):
        combined = fused.combine(a, x, b, y)
        require_equal(combined, fused.combine_generic(a, x, b, y), x)
        np.testing.assert_allclose(
            to_numpy(combined), a * before[0] + b * before[1], rtol=1e-5, atol=1e-6
        )
    for v, old in zip(pair, before, strict=True):
        np.testing.assert_array_equal(to_numpy(v), old)


@pytest.mark.parametrize("kind", [float, np.float64])
def test_combining_keeps_the_precision(kind, backend: Backend):
    xp = backend.xp
    x, y = (xp.astype(v * backend.ones((3,)), xp.float32) for v in (2.0, 4.0))
    combined = fused.combine(kind(0.75), x, kind(0.25), y)
    assert combined.dtype == xp.float32
    np.testing.assert_array_equal(to_numpy(combined), np.full(3, 2.5))


def test_combining_by_numbers_on_the_device(backend: Backend, dtype: str):
    kind = getattr(backend.xp, dtype)
    x, y = (backend.asarray(np.asarray([v]), kind) for v in (2.0, 4.0))
    a = backend.asarray(np.asarray(0.75), backend.xp.float64)
    combined = fused.combine(a, x, 1.0 - a, y)
    assert combined.dtype == kind
    assert float(combined[0]) == 2.5
