"""Minibatches: every example once an epoch, resumable anywhere, of any size."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfac_np.data import BatchState, ConstantBatch, GrowingBatch, MiniBatches
from kfac_np.errors import InputError

counts = st.integers(1, 40)
sizes = st.lists(st.integers(1, 60), min_size=1, max_size=30)
seeds = st.integers(0, 2**32)


def draw(batches, sizes, state=None):
    """States and batches for a sequence of sizes."""
    state, states, drawn = state or BatchState(), [], []
    for size in sizes:
        state, indices = batches.next(state, size)
        states.append(state)
        drawn.append(indices)
    return states, drawn


@given(n=counts, sizes=sizes, seed=seeds)
def test_batches_have_the_size_asked_for(n, sizes, seed):
    _, drawn = draw(MiniBatches(n, seed), sizes)
    for size, indices in zip(sizes, drawn, strict=True):
        assert indices.dtype == np.int64
        assert indices.shape == (min(size, n),)
        assert 0 <= indices.min() <= indices.max() < n


@given(n=st.integers(2, 40), sizes=sizes, seed=seeds)
def test_each_epoch_has_every_example_once(n, sizes, seed):
    # Full batches are the subject of the next test.
    _, drawn = draw(MiniBatches(n, seed), [1 + size % (n - 1) for size in sizes])
    stream = np.concatenate(drawn)
    for start in range(0, len(stream) - n + 1, n):
        assert sorted(stream[start : start + n].tolist()) == list(range(n))
    rest = stream[len(stream) // n * n :]
    assert len(set(rest.tolist())) == len(rest)


@given(n=counts, sizes=sizes, seed=seeds, excess=st.integers(0, 5))
def test_full_batch_has_every_example_once_and_ends_an_epoch(n, sizes, seed, excess):
    batches = MiniBatches(n, seed)
    (*_, before), _ = draw(batches, sizes)
    after, indices = batches.next(before, n + excess)
    assert sorted(indices.tolist()) == list(range(n))
    assert after == BatchState(before.epoch + (2 if before.position else 1), 0)


@given(n=counts, sizes=sizes, seed=seeds, cut=st.integers(0, 30))
def test_resumed_anywhere_the_batches_are_the_same(n, sizes, seed, cut):
    cut = min(cut, len(sizes))
    states, drawn = draw(MiniBatches(n, seed), sizes)
    saved = dataclasses.asdict(states[cut - 1]) if cut else {"epoch": 0, "position": 0}
    assert all(type(value) is int for value in saved.values())
    # Another object in another process: only the integers are carried over.
    again_states, again = draw(MiniBatches(n, seed), sizes[cut:], BatchState(**saved))
    assert again_states == states[cut:]
    for first, second in zip(drawn[cut:], again, strict=True):
        assert np.array_equal(first, second)


@given(n=counts, sizes=sizes, seed=seeds)
def test_the_stream_does_not_depend_on_how_it_is_cut(n, sizes, seed):
    sizes = [min(size, n - 1) for size in sizes if n > 1]
    _, drawn = draw(MiniBatches(n, seed), sizes)
    _, single = draw(MiniBatches(n, seed), [1] * sum(sizes))
    assert np.array_equal(np.concatenate([*drawn, []]), np.concatenate([*single, []]))


def test_epochs_and_seeds_are_shuffled_differently():
    batches = MiniBatches(100)
    _, (first, second) = draw(batches, [100, 100])
    _, (other,) = draw(MiniBatches(100, seed=1), [100])
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, np.arange(100))


def test_batch_across_the_end_of_an_epoch():
    batches = MiniBatches(5, seed=3)
    _, (whole, following) = draw(batches, [5, 5])
    (_, state), (_, across) = draw(batches, [3, 4])
    assert state == BatchState(1, 2)
    assert across.tolist() == [*whole[3:].tolist(), *following[:2].tolist()]


def test_batch_that_just_ends_an_epoch():
    (_, state), (_, indices) = draw(MiniBatches(5), [3, 2])
    assert state == BatchState(1, 0)
    assert len(indices) == 2


def test_one_example():
    states, drawn = draw(MiniBatches(1), [1, 5])
    assert states == [BatchState(1), BatchState(2)]
    assert [indices.tolist() for indices in drawn] == [[0], [0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MiniBatches(0), "MiniBatches n: expected an integer > 0, got 0"),
        (lambda: MiniBatches(5, seed=-1), "seed: expected an integer >= 0, got -1"),
        (lambda: BatchState(-1), "epoch: expected an integer >= 0, got -1"),
        (lambda: BatchState(0, 1.5), "position: expected an integer >= 0, got 1.5"),
        (
            lambda: MiniBatches(5).next(BatchState(), 0),
            "batch size: expected an integer > 0, got 0",
        ),
        (
            lambda: MiniBatches(5).next(BatchState(), 2.0),
            "batch size: expected an integer > 0, got 2.0",
        ),
        (lambda: MiniBatches(5).next(BatchState(0, 5), 1), "belongs to another data set"),
        (lambda: ConstantBatch(0), "size: expected an integer > 0, got 0"),
        (lambda: ConstantBatch(8)(0, 5), "got k=0, n=5"),
        (lambda: GrowingBatch(first=0), "first: expected an integer > 0, got 0"),
        (lambda: GrowingBatch(True), "first: expected an integer > 0, got True"),
        (lambda: ConstantBatch(True), "got True"),
        (lambda: GrowingBatch(full_at=0), "full_at: expected an integer > 0, got 0"),
        (lambda: GrowingBatch(most=0), "most: expected an integer > 0, got 0"),
        (lambda: GrowingBatch(500, most=400), "expected most >= first, got 400 and 500"),
        (lambda: GrowingBatch()(1, 0), "got k=1, n=0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(InputError, match=message):
        make()


# Sizes


@given(k=st.integers(1, 10**6), n=st.integers(1, 10**6), size=st.integers(1, 10**6))
def test_constant_size(k, n, size):
    assert ConstantBatch(size)(k, n) == min(size, n)


@given(first=st.integers(1, 2000), full_at=st.integers(1, 600), n=st.integers(1, 100_000))
def test_growing_size(first, full_at, n):
    size = GrowingBatch(first, full_at)
    drawn = [size(k, n) for k in range(1, full_at + 3)]
    assert all(type(m) is int for m in drawn)
    assert drawn == sorted(drawn)
    assert drawn[full_at - 1 :] == [n, n, n]
    assert drawn[0] == (min(first, n) if full_at > 1 else n)


@given(first=st.integers(1, 2000), more=st.integers(0, 5000), n=st.integers(1, 100_000))
def test_growing_size_stops_where_it_is_told(first, more, n):
    most = first + more
    free, bounded = GrowingBatch(first, 50), GrowingBatch(first, 50, most)
    assert [bounded(k, n) for k in range(1, 60)] == [min(free(k, n), most) for k in range(1, 60)]


def test_growing_size_is_the_published_rule():
    # m_k = min(m₁ exp((k-1)/b), |S|), m₁ = 1000, m₅₀₀ = |S|
    n = 20_000
    b = 499 / math.log(20)
    for k in (1, 2, 100, 333, 499):
        assert abs(GrowingBatch()(k, n) - 1000 * math.exp((k - 1) / b)) <= 0.5
    assert [GrowingBatch()(k, n) for k in (500, 501, 10**9)] == [n, n, n]
    assert GrowingBatch()(1, 500) == 500
