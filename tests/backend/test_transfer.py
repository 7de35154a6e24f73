"""Arrays that arrive later, and batches that are sent beforehand."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import numpy as np
import pytest
from simulated_cupy import Machine

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
    with pytest.raises(InputError, match=r"prefetch ahead: expected an integer > 0, got"):
        prefetch([], backend, ahead)


@pytest.fixture(params=["late", "eager"])
def machine(request, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A simulated GPU, whose streams do their work as late or as early as they may."""
    simulated = Machine(eager=request.param == "eager")
    monkeypatch.setitem(sys.modules, "cupy", simulated.module)
    monkeypatch.setitem(sys.modules, "cupyx", simulated.extra)
    return simulated


def test_simulated_later(machine: Machine):
    """What is copied is what was there then, and waiting leaves later kernels alone."""
    x = machine.array(np.arange(4.0))
    coming = later(x)
    machine.launch(lambda v: np.copyto(v, -1.0), x)
    assert machine.current.finished == 0
    np.testing.assert_array_equal(coming.numpy(), np.arange(4.0))
    assert machine.current.finished == len(machine.current.queue) - 1


def test_simulated_later_of_what_is_gone(machine: Machine):
    coming = later(machine.array(np.arange(4.0)))
    other = machine.array(np.full(4, 7.0))  # in the same memory
    np.testing.assert_array_equal(coming.numpy(), np.arange(4.0))
    np.testing.assert_array_equal(later(other).numpy(), np.full(4, 7.0))


def test_simulated_later_that_nobody_reads(machine: Machine):
    """Its page-locked memory is not given to others while the copy is still to come.

    Nobody waits for that; the next copy after it has come takes the memory over.
    """
    coming = later(machine.array(np.arange(4.0)))
    del coming
    assert machine.current.finished == 0
    locked = machine.extra.empty_pinned((4,), np.float64)
    locked[...] = 5.0
    later(machine.array(np.arange(4.0))).numpy()
    np.testing.assert_array_equal(locked, np.full(4, 5.0))
    blocks = len(machine.locked.all)
    for _ in range(5):
        later(machine.array(np.arange(4.0))).numpy()
    assert len(machine.locked.all) == blocks


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("taken", [2, 9])
@pytest.mark.parametrize("kernels_first", [False, True])
def test_simulated_prefetch(kernels_first: bool, ahead: int, taken: int, machine: Machine):
    """Batches arrive before kernels use them, into memory that no kernel uses any more."""
    backend = Backend(machine.module, nullcontext(), np.dtype("float32"))
    sums: list[float] = []

    def load():
        buffer = np.empty((3, 2))
        for k in range(9):
            buffer[...] = k
            yield buffer, np.full(3, k), None

    batches = prefetch(load(), backend, ahead)
    for _, (x, t, nothing) in zip(range(taken), batches):  # noqa: B905
        assert nothing is None
        assert (x.dtype, t.dtype) == (np.float32, np.int64)
        machine.launch(lambda a, b: sums.append(float(a.sum() + b.sum())), x, t)
        del x, t  # their memory is used for the next ones
    if kernels_first:
        machine.current.synchronize()
    batches.close()
    others = [machine.array(np.full((3, 2), -k, dtype=np.float32)) for k in range(8)]
    locked = [machine.extra.empty_pinned((3, 2), np.float32) for _ in range(8)]
    for k, memory in enumerate(locked):
        memory[...] = k
    machine.finish()
    assert sums == [9.0 * k for k in range(taken)]
    for k, (array, memory) in enumerate(zip(others, locked, strict=True)):
        np.testing.assert_array_equal(array.values, np.full((3, 2), -k))
        np.testing.assert_array_equal(memory, np.full((3, 2), k))


@pytest.mark.parametrize("batch", [np.ones((2, 3)), {"x": np.ones(2)}])
def test_batches_are_tuples_or_lists(batch, backend: Backend):
    with pytest.raises(InputError, match="prefetch: expected batches that are tuples or lists"):
        list(prefetch([batch], backend))
