"""Patches: unfolding and folding against their definition, one another and their budget."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_close, host

from kfac_np.backend import (
    Backend,
    Geometry,
    Patches,
    fold,
    get_backend,
    pad,
    patch_budget,
    patches,
    transposed_product,
    unfold,
)
from kfac_np.backend.unfolding import transposed_product_generic, unfold_generic
from kfac_np.errors import ShapeError

HostArray = np.ndarray[Any, Any]
NUMPY = get_backend("numpy", "float64")


@dataclass(frozen=True)
class Drawn:
    """A geometry and an input that it fits into, not padded yet."""

    geometry: Geometry
    x: HostArray

    @property
    def size(self) -> tuple[int, ...]:
        return self.x.shape[1:-1]


@st.composite
def geometries(draw: Any) -> Drawn:
    """One to three axes, any stride and dilation, zeros put on and pixels cut off."""
    axes = draw(st.integers(1, 3))
    each = st.integers(1, 3 if axes < 3 else 2)
    kernel, stride, dilation = (tuple(draw(each) for _ in range(axes)) for _ in range(3))
    width = st.integers(-2, 3)
    padding = tuple((draw(width), draw(width)) for _ in range(axes))
    size = []
    for k, d, (low, high) in zip(kernel, dilation, padding, strict=True):
        least = max(d * (k - 1) + 1 - low - high, max(-low, 0) + max(-high, 0) + 1)
        size.append(max(least, 1) + draw(st.integers(0, 3)))
    shape = (draw(st.integers(1, 4)), *size, draw(st.integers(1, 3)))
    x = np.random.default_rng(0).standard_normal(shape)
    return Drawn(Geometry(kernel, stride, dilation, padding), x)


def definition(x: HostArray, g: Geometry, ones: bool) -> HostArray:
    """Pixel by pixel, of a padded input."""
    out = g.unpadded.output_size(x.shape[1:-1])
    rows = []
    for location in itertools.product(*map(range, out)):
        patch = []
        for tap in itertools.product(*map(range, g.kernel)):
            steps = zip(location, g.stride, tap, g.dilation, strict=True)
            patch.append(x[(slice(None), *(t * s + i * d for t, s, i, d in steps))])
        if ones:
            patch.append(np.ones((len(x), 1)))
        rows.append(np.concatenate(patch, axis=-1))
    return np.stack(rows, axis=1)


@given(drawn=geometries(), ones=st.booleans())
def test_unfold_is_its_definition(backend: Backend, drawn: Drawn, ones: bool):
    x = pad(backend.asarray(drawn.x), drawn.geometry.padding)
    expected = definition(host(x), drawn.geometry, ones)
    for f in (unfold, unfold_generic):
        assert np.array_equal(host(f(x, drawn.geometry, ones)), expected)


@given(drawn=geometries())
def test_unfold_of_what_is_not_contiguous(drawn: Drawn):
    """Reversed, transposed and strided views; single precision and integers stay so."""
    x = pad(drawn.x, drawn.geometry.padding)
    wide = np.zeros(tuple(2 * n for n in x.shape))
    wide[tuple(slice(None, None, 2) for _ in x.shape)] = x
    views = [
        np.asfortranarray(x),
        np.flip(np.flip(x).copy()),
        wide[tuple(slice(None, None, 2) for _ in x.shape)],
        np.broadcast_to(x[:1], x.shape),
        x.astype(np.float32),
        np.round(10 * x).astype(np.int64),
    ]
    for view in views:
        found = unfold(view, drawn.geometry)
        assert found.dtype == view.dtype
        assert np.array_equal(found, unfold_generic(view, drawn.geometry))
        # rows may be written to, the input is not theirs
        assert not np.shares_memory(found, view)


@given(drawn=geometries())
def test_fold_is_the_adjoint_of_unfold(backend: Backend, drawn: Drawn):
    x = pad(backend.asarray(drawn.x), drawn.geometry.padding)
    rows = unfold(x, drawn.geometry)
    other = backend.asarray(np.random.default_rng(1).standard_normal(rows.shape))
    folded = fold(other, drawn.geometry, x.shape[1:-1])
    assert folded.shape == x.shape
    products = float(np.sum(host(other) * host(rows))), float(np.sum(host(folded) * host(x)))
    assert products[0] == pytest.approx(products[1], rel=1e-12, abs=1e-12)


@given(drawn=geometries())
def test_padding_back_is_the_adjoint_of_padding(backend: Backend, drawn: Drawn):
    """What was put on is cut off, and what was cut off is 0."""
    x = backend.asarray(drawn.x)
    padded = pad(x, drawn.geometry.padding)
    assert padded.shape[1:-1] == drawn.geometry.padded_size(drawn.size)
    other = backend.asarray(np.random.default_rng(1).standard_normal(padded.shape))
    back = pad(other, tuple((-low, -high) for low, high in drawn.geometry.padding))
    assert back.shape == x.shape
    products = float(np.sum(host(other) * host(padded))), float(np.sum(host(back) * host(x)))
    assert products[0] == pytest.approx(products[1], rel=1e-12, abs=1e-12)


@given(drawn=geometries(), budget=st.sampled_from([1, 100, 999, 2**30]))
def test_transposed_product(backend: Backend, drawn: Drawn, budget: int):
    """Both ways of computing it, and the adjoint of a product with patches."""
    g, c, c_out = drawn.geometry, drawn.x.shape[-1], 2
    rng = np.random.default_rng(2)
    w = rng.standard_normal((c_out, g.taps * c))
    derivative = rng.standard_normal((len(drawn.x), *g.output_size(drawn.size), c_out))
    arguments = backend.asarray(derivative), backend.asarray(w), g, drawn.size, budget
    found = transposed_product(*arguments)
    assert found.shape == drawn.x.shape
    assert_close(found, transposed_product_generic(*arguments), 1e-13)
    y = definition(pad(drawn.x, g.padding), g, False) @ w.T
    products = float(np.sum(derivative.reshape(y.shape) * y)), float(np.sum(host(found) * drawn.x))
    assert products[0] == pytest.approx(products[1], rel=1e-11, abs=1e-11)


@given(drawn=geometries(), ones=st.booleans(), budget=st.integers(1, 4000))
def test_chunks_cover_every_example_once_and_keep_to_the_budget(
    drawn: Drawn, ones: bool, budget: int
):
    x = drawn.x
    p = Patches(drawn.x, drawn.geometry, ones, budget)
    whole = p.array()
    assert p.shape == whole.shape
    assert p.ndim == whole.ndim
    assert (whole.shape[1],) == (math.prod(p.out),)
    covered = []
    for rows, chunk in p.chunks():
        assert np.array_equal(chunk, whole[rows])
        assert chunk.nbytes <= budget or len(chunk) == 1
        covered += range(len(x))[rows]
    assert covered == list(range(len(x)))
    assert np.array_equal(p.take(slice(1, 3)).array(), whole[1:3])
    m = np.random.default_rng(1).standard_normal((whole.shape[2], 2))
    assert_close(p.product(m), (whole @ m).reshape(len(x), *p.out, 2), 1e-13)


def test_a_budget_counts_the_numbers_of_its_precision():
    g = Geometry((2,), (1,), (1,), ((0, 0),))
    for dtype, examples in ((np.float64, 2), (np.float32, 4)):
        p = Patches(np.zeros((8, 3, 1), dtype=dtype), g, True, 2 * 2 * 3 * 8)
        assert {chunk.shape[0] for _, chunk in p.chunks()} == {examples}
        assert p.product(np.zeros((3, 1), dtype=dtype)).dtype == dtype


def test_nothing_is_unfolded_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    """And then one chunk at a time."""
    calls = []

    def counted(x: HostArray, *others: Any) -> HostArray:
        calls.append(len(x))
        return unfold(x, *others)

    monkeypatch.setattr(patches, "unfold", counted)
    p = Patches(np.ones((5, 4, 1)), Geometry((2,), (1,), (1,), ((0, 0),)), True, 200)
    assert (p.shape, p.out, p.take(slice(0, 2)).shape, calls) == ((5, 3, 3), (3,), (2, 3, 3), [])
    chunks = p.chunks()
    next(chunks)
    assert calls == [2]
    assert sum(len(chunk) for _, chunk in chunks) == 3
    assert calls == [2, 2, 1]


def test_the_budget_of_a_processor_is_what_its_cache_holds(backend: Backend):
    if "cupy" not in backend.xp.__name__:
        assert patch_budget(backend.zeros((1,))) == 2**23


@pytest.mark.parametrize(
    ("size", "padding"),
    [((4,), ((-4, 0),)), ((4,), ((-2, -2),)), ((4,), ((-5, 9),)), ((4, 3), ((1, 1), (0, -3)))],
)
def test_cutting_everything_off_is_refused(
    size: tuple[int, ...], padding: tuple[tuple[int, int], ...]
):
    g = Geometry((1,) * len(size), (1,) * len(size), (1,) * len(size), padding)
    with pytest.raises(ShapeError, match=r"something to be left of \(4,.*after padding"):
        pad(np.ones((2, *size, 1)), padding)
    with pytest.raises(ShapeError, match=r"something to be left of \(4,"):
        g.output_size(size)


def test_kernels_that_do_not_fit_are_refused():
    g = Geometry((3, 1), (1, 1), (2, 1), ((1, 0), (0, 0)))
    with pytest.raises(ShapeError, match=r"padded size of at least \(5, 1\), got \(4, 9\)"):
        g.output_size((3, 9))
    assert g.output_size((4, 9)) == (1, 9)


def test_a_border_of_another_value(backend: Backend):
    x = backend.asarray([[[1.0], [2.0]]])
    assert host(pad(x, ((1, 2),), -5.0))[0, :, 0].tolist() == [-5.0, 1.0, 2.0, -5.0, -5.0]
    assert pad(x, ((0, 0),)) is x
