"""Arrays that arrive later, and batches that are sent beforehand."""

from __future__ import annotations

import numpy as np
import pytest

from kfac_np.backend import Backend, Rng, later, prefetch, to_numpy
from kfac_np.errors import InputError


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 3)])
def test_later_is_the_array(shape: tuple[int, ...], backend: Backend):
    x = Rng(0).normal(shape, backend)
    coming = later(x)
    y = 2.0 * x  # work that is queued after the copy
    found = coming.numpy()
    assert isinstance(found, np.ndarray)
    assert found.shape == shape
    assert coming.numpy() is found
    np.testing.assert_array_equal(found, to_numpy(x))
    np.testing.assert_array_equal(to_numpy(y), 2.0 * found)


def test_later_keeps_dtypes_and_takes_views(backend: Backend):
    whole = backend.asarray(np.arange(24).reshape(4, 6))
    for view in (whole.T, whole[::2, 1:], whole[1, 2]):
        np.testing.assert_array_equal(later(view).numpy(), to_numpy(view))
        assert later(view).numpy().dtype == np.int64
    assert later(whole > 3).numpy().dtype == np.bool_


def test_later_may_be_dropped_unread(backend: Backend):
    kept = [later(k * backend.ones((50,))) for k in range(100)]
    del kept[::2]
    for k, coming in zip(range(1, 100, 2), kept, strict=True):
        np.testing.assert_array_equal(coming.numpy(), np.full(50, float(k)))


@pytest.mark.parametrize("ahead", [1, 2, 5, 50])
def test_prefetch_gives_all_batches_in_order(ahead: int, backend: Backend):
    host = [(np.full((3, k), k / 2), np.arange(3, dtype=np.int32) + k) for k in range(7)]
    found = list(prefetch(host, backend, ahead))
    assert len(found) == len(host)
    for (x, t), (host_x, host_t) in zip(found, host, strict=True):
        assert Backend.of(x) == backend
        assert t.dtype == backend.xp.int32
        np.testing.assert_array_equal(to_numpy(x), host_x)
        np.testing.assert_array_equal(to_numpy(t), host_t)


def test_prefetch_of_memory_that_is_reused(backend: Backend):
    """The buffer of one batch is overwritten by the next, as loaders do."""

    def load():
        buffer = np.empty((4, 5))
        for k in range(6):
            buffer[...] = k
            yield (buffer.copy() if backend.name in ("numpy", "torch") else buffer,)

    for k, (x,) in enumerate(prefetch(load(), backend)):
        np.testing.assert_array_equal(to_numpy(x), np.full((4, 5), float(k)))


def test_prefetch_of_views_nothing_and_the_same_twice(backend: Backend):
    x = np.arange(12.0).reshape(3, 4)
    ((a, b, c, d),) = prefetch([(x.T, None, x, x)], backend)
    assert b is None
    assert c is d
    np.testing.assert_array_equal(to_numpy(a), x.T)
    np.testing.assert_array_equal(to_numpy(c), x)
    assert list(prefetch([], backend)) == []
    assert list(prefetch([()], backend)) == [()]


def test_prefetch_that_is_given_up(backend: Backend):
    batches = prefetch(((np.full(3, k),) for k in range(100)), backend)
    (first,) = next(batches)
    batches.close()
    np.testing.assert_array_equal(to_numpy(first), np.zeros(3))


@pytest.mark.parametrize("ahead", [0, -1, 1.5, True])
def test_prefetch_ahead(ahead, backend: Backend):
    with pytest.raises(InputError, match=r"prefetch ahead: expected a whole number >= 1, got"):
        prefetch([], backend, ahead)
