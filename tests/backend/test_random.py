"""Random numbers: reproducible, independent, the same on every backend."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_np.backend import Backend, Rng, get_backend, to_numpy
from kfac_np.errors import InputError

HOST = get_backend("numpy", "float64")


def numbers(rng: Rng) -> np.ndarray:
    return to_numpy(rng.normal((50,), HOST))


def test_the_same_on_every_backend(backend: Backend):
    for draw in ("normal", "uniform"):
        here = getattr(Rng(1, "a"), draw)((3, 4), backend)
        assert Backend.of(here) == backend
        np.testing.assert_array_equal(to_numpy(here), getattr(Rng(1, "a"), draw)((3, 4), HOST))
    rate = np.asarray([0.5, 3.0, 100.0])
    counts = Rng(1).poisson(rate, backend)
    assert Backend.of(counts) == backend
    np.testing.assert_array_equal(to_numpy(counts), Rng(1).poisson(rate, HOST))


def test_a_stream_is_its_path():
    np.testing.assert_array_equal(numbers(Rng(7, "x", 3)), numbers(Rng(7).child("x").child(3)))
    np.testing.assert_array_equal(numbers(Rng(7, "x", 3)), numbers(Rng(7, "x").child(3)))
    assert Rng(7).child("x", 3).keys == ("x", 3)
    assert Rng(np.int64(7)).seed == 7


def test_a_child_does_not_depend_on_what_its_parent_has_drawn():
    used, fresh = Rng(7), Rng(7)
    numbers(used)
    np.testing.assert_array_equal(numbers(used.child(1)), numbers(fresh.child(1)))


@pytest.mark.parametrize("seed", [0, 7, 2**32, 2**128, 2**200 + 3])
@pytest.mark.parametrize("path", [(), (3,), ("ab", 2**40)])
def test_a_stream_is_numpys_own(seed: int, path: tuple[int | str, ...]):
    words = {(): (), (3,): (0, 1, 3), ("ab", 2**40): (1, 2, 97, 98, 0, 2, 0, 256)}[path]
    sequence = np.random.SeedSequence(seed, spawn_key=words)
    expected = np.random.default_rng(sequence).standard_normal(50)
    np.testing.assert_array_equal(numbers(Rng(seed, *path)), expected)


def test_a_stream_goes_on():
    rng = Rng(7)
    assert not np.array_equal(numbers(rng), numbers(rng))


PATHS = [
    *[(), (0,), (1,), (0, 0), (0, 1), (1, 0), (2**32,), (2**40,), (97,), (1, 97)],
    *[("",), ("a",), ("b",), ("a", "b"), ("ab",), ("a", 0), ("0",), ("aa",), ("a", "a"), ("ä",)],
]


def test_different_paths_are_different_streams():
    streams = [numbers(Rng(7, *path)) for path in PATHS]
    streams += [numbers(Rng(seed)) for seed in (0, 1, 8)]
    for a, b in itertools.combinations(streams, 2):
        assert not np.any(a == b)


key = st.integers(0, 2**40) | st.text(max_size=3)
paths = st.lists(key, max_size=4).map(tuple)


@given(paths, paths)
def test_streams_of_different_paths_never_meet(one, other):
    same = one == other
    assert np.array_equal(numbers(Rng(0, *one)), numbers(Rng(0, *other))) == same


def test_streams_are_uncorrelated():
    x = np.stack([to_numpy(Rng(3, k).normal((4000,), HOST)) for k in range(8)])
    off = np.corrcoef(x) - np.eye(8)
    assert np.abs(off).max() < 5 / 4000**0.5


def test_moments():
    n = 40_000
    z, u = to_numpy(Rng(1).normal((n,), HOST)), to_numpy(Rng(2).uniform((n,), HOST))
    counts = to_numpy(Rng(3).poisson(np.full(n, 2.5), HOST))
    # Five standard errors of means and variances.
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(counts.mean() - 2.5) < 5 * (2.5 / n) ** 0.5
    assert abs(counts.var() - 2.5) < 5 * ((2.5 + 2 * 2.5**2) / n) ** 0.5


def test_uniform_in_single_precision_stays_below_one(backend: Backend):
    single = Backend(backend.xp, backend.device, backend.xp.float32)
    u = Rng(0).uniform((200_000,), single)
    assert u.dtype == backend.xp.float32
    assert bool(backend.xp.all(u < 1))
    assert bool(backend.xp.all(u >= 0))


def test_host_draws():
    assert sorted(Rng(1).permutation(20).tolist()) == list(range(20))
    np.testing.assert_array_equal(Rng(1).permutation(20), Rng(1).permutation(20))
    assert not np.array_equal(Rng(1).permutation(20), Rng(2).permutation(20))
    drawn = Rng(1).integers(3, 6, (5, 100))
    assert drawn.shape == (5, 100)
    assert set(drawn.ravel().tolist()) == {3, 4, 5}


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3)])
def test_shapes(shape, backend: Backend):
    assert Rng(0).normal(shape, backend).shape == shape
    assert Rng(0).uniform(shape, backend).shape == shape
    assert Rng(0).poisson(np.ones(shape), backend).shape == shape


def test_negative_seeds_are_refused():
    with pytest.raises(InputError, match="Rng: expected a non-negative seed and keys, got -1"):
        Rng(-1)
    with pytest.raises(InputError, match="Rng: expected a non-negative seed and keys, got -2"):
        Rng(0).child("a", -2)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0), (3, 2, 5)])
def test_bernoulli_shapes(shape, dtype: str, backend: Backend):
    """The same on every backend, like the probabilities in all respects, which are left alone."""
    host = np.random.default_rng(0).uniform(size=shape)
    p = backend.asarray(host, getattr(backend.xp, dtype))
    drawn = Rng(4).bernoulli(p)
    assert Backend.of(drawn) == Backend.of(p)
    assert drawn.shape == shape
    np.testing.assert_array_equal(to_numpy(drawn), Rng(4).bernoulli(host.astype(dtype)))
    np.testing.assert_array_equal(to_numpy(p), host.astype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bernoulli_frequencies(dtype: str):
    """Of each probability, and of pairs in a row, which share a part of their numbers."""
    n = 400_000
    p = np.asarray([0.0, 1e-3, 0.25, 0.5, 0.9, 1.0], dtype=dtype)
    drawn = Rng(1).bernoulli(np.broadcast_to(p, (n, 6)))
    assert set(np.unique(drawn)) == {0.0, 1.0}
    error = np.sqrt(p * (1 - p) / n)
    assert np.all(np.abs(drawn.mean(axis=0) - p) <= 4.5 * error)
    centred = (drawn - p).astype(np.float64)
    covariance = centred.T @ centred / n
    bound = 4.5 * np.outer(np.sqrt(p * (1 - p)), np.sqrt(p * (1 - p))) / np.sqrt(n)
    off = ~np.eye(6, dtype=bool)
    assert np.all(np.abs(covariance)[off] <= bound[off] + 1e-15)


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 24), ("float64", 53)])
def test_bernoulli_resolves_all_bits(dtype: str, bits: int, monkeypatch: pytest.MonkeyPatch):
    """The smallest number drawn is 0, the next 2⁻²⁴ or 2⁻⁵³, the largest a step below 1."""
    numbers = []

    def catch(p, coarse, fine):
        numbers.append((np.asarray(coarse, dtype=p.dtype) + fine) * p.dtype.type(2.0**-16))
        return p

    monkeypatch.setattr("kfac_np.backend.random.bernoulli", catch)
    Rng(2).bernoulli(np.zeros((1000, 1000), dtype=dtype))
    (u,) = numbers
    assert u.dtype == dtype
    steps = u.astype(np.float64) * 2.0**bits
    np.testing.assert_array_equal(steps, np.round(steps))  # nothing was rounded away
    assert 0.0 <= u.min() < 1e-5
    assert 1 - 1e-5 < u.max() < 1.0
    low_bits = np.unique(steps % 2.0 ** (bits - 16))
    assert len(low_bits) > (250 if bits == 24 else 990)
    # A thousand numbers of a row are as evenly spread as others: within ±5 standard errors.
    assert np.abs(u.mean(axis=1, dtype=np.float64) - 0.5).max() < 5 * (12 * 1000) ** -0.5


def test_bernoulli_passes_on_what_is_no_probability(backend: Backend):
    p = backend.asarray([-0.5, 1.5, float("nan")])
    np.testing.assert_array_equal(to_numpy(Rng(0).bernoulli(p)), [0.0, 1.0, 0.0])
