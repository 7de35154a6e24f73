"""Copies between host and device that nobody waits for until the numbers are needed."""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, final

import array_api_compat
import numpy as np

from kfac_np.backend.array import Array, Backend, to_numpy
from kfac_np.errors import InputError
from kfac_np.validation import require_integer

__all__ = ["Later", "later", "prefetch"]

Batch = tuple[Any, ...]  # arrays, or None where there is nothing


@final
class Later:
    """An array on its way to the host; `later` makes it.

    Examples
    --------
    >>> from kfac_np.backend import get_backend
    >>> loss = later(get_backend().ones(()))
    >>> float(loss.numpy())
    1.0
    """

    def __init__(self, fetch: Callable[[], np.ndarray[Any, Any]]) -> None:
        self._fetch: Callable[[], np.ndarray[Any, Any]] | None = fetch
        self._value: np.ndarray[Any, Any] | None = None

    def numpy(self) -> np.ndarray[Any, Any]:
        """Return the values, waiting for them if they have not arrived; the same array each time.

        Returns
        -------
        numpy.ndarray
            Shape and dtype of the array that was asked for.
        """
        if self._value is None:
            assert self._fetch is not None
            self._value = self._fetch()
            self._fetch = None  # it holds the device's array
        return self._value


def later(x: Array) -> Later:
    """Start copying a (small) array to the host.

    With CuPy the copy is queued behind what the current stream has been given so far, into
    page-locked memory, and `Later.numpy` waits for that copy alone: kernels launched since then
    go on. Nobody waits for what is dropped unread. Elsewhere the array is converted when it is
    asked for.

    Parameters
    ----------
    x : Array
        Of any shape and dtype. It must not be written to before the values have been read.

    Returns
    -------
    Later

    Examples
    --------
    >>> import numpy as np
    >>> later(np.asarray([1.0, 2.0])).numpy()
    array([1., 2.])
    """
    if array_api_compat.is_cupy_array(x) and 0 not in x.shape:
        return _later_from_cupy(x)
    return Later(partial(to_numpy, x))


def _later_from_cupy(x: Any) -> Later:
    import cupy
    import cupyx

    host = cupyx.empty_pinned(x.shape, x.dtype)
    with x.device:
        x.get(out=host, blocking=False)
        arrival = cupy.cuda.Event(disable_timing=True)
        arrival.record()

    def fetch() -> np.ndarray[Any, Any]:
        arrival.synchronize()
        release.detach()
        return np.array(host)  # ordinary memory: the page-locked block goes back to its pool

    _let_go()
    value = Later(fetch)
    # Dropped unread: the block must not go back to the pool while the device still writes to it.
    release = weakref.finalize(value, _dropped().append, (arrival, host))
    release.atexit = False  # by then the driver may be gone, and nothing uses the pool any more
    return value


@functools.cache
def _dropped() -> deque[tuple[Any, Any]]:
    """Arrivals that nobody waits for, and the page-locked memory that is theirs until then."""
    return deque()


def _let_go() -> None:
    """Give back the memory of those that have arrived."""
    held = _dropped()
    for _ in range(len(held)):
        arrival, host = held.popleft()
        if not arrival.done:
            held.append((arrival, host))


def prefetch(batches: Iterable[Sequence[Any]], backend: Backend, ahead: int = 2) -> Iterator[Batch]:
    """Yield minibatches of host arrays as arrays of the backend, some of them sent beforehand.

    With CuPy the next `ahead` batches travel from page-locked memory on a stream of their own
    while kernels run; the stream that is current when a batch is yielded waits for its arrival,
    the host does not. Elsewhere batches are converted one at a time.

    Parameters
    ----------
    batches : iterable of sequences of array_like or None
        For example (x, t) pairs. With CuPy it is read `ahead` batches in advance, and memory of
        a batch may be reused when the next is asked for; elsewhere the results may share it.
    backend : Backend
    ahead : int
        At least 1. So many batches and one more occupy memory on the device.

    Returns
    -------
    iterator of tuple of Array or None
        Floats have the backend's dtype, other arrays their own, as with `Backend.asarray`. An
        array that a batch holds twice is sent once, and is the same array afterwards.

    Raises
    ------
    InputError
        `ahead` is not an integer > 0.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.backend import get_backend
    >>> pairs = [(np.zeros((2, 3)), np.asarray([0, 1]))] * 4
    >>> [x.shape for x, t in prefetch(pairs, get_backend())]
    [(2, 3), (2, 3), (2, 3), (2, 3)]
    """
    require_integer("prefetch ahead", ahead)
    if array_api_compat.is_cupy_namespace(backend.xp):
        return _prefetch_to_cupy(batches, backend, ahead)
    return (_each_once(batch, backend.asarray) for batch in batches)


def _each_once(batch: Sequence[Any], send: Callable[[Any], Array]) -> Batch:
    """`send` of every array; the same result for the same array."""
    if not isinstance(batch, tuple | list):
        raise InputError(
            f"prefetch: expected batches that are tuples or lists of arrays, got a "
            f"{type(batch).__name__}"
        )
    sent = {id(values): None if values is None else send(values) for values in batch}
    return tuple(sent[id(values)] for values in batch)


def _prefetch_to_cupy(
    batches: Iterable[Sequence[Any]], backend: Backend, ahead: int
) -> Iterator[Batch]:
    import cupy

    with backend.device:
        copies = cupy.cuda.Stream(non_blocking=True)  # does not wait for the default stream
    under_way: deque[tuple[Batch, Any, list[Any]]] = deque()
    held: deque[tuple[Any, list[Any]]] = deque()  # page-locked memory of batches handed out

    def hand_out() -> Batch:
        arrays, arrival, buffers = under_way.popleft()
        with backend.device:
            cupy.cuda.get_current_stream().wait_event(arrival)
        held.append((arrival, buffers))
        while held and held[0][0].done:
            held.popleft()
        return arrays

    try:
        for batch in batches:
            under_way.append(_send_to_cupy(batch, backend, copies))
            if len(under_way) > ahead:
                yield hand_out()
        while under_way:
            yield hand_out()
    finally:
        copies.synchronize()  # before memory on either side is given back


def _send_to_cupy(
    batch: Sequence[Any], backend: Backend, copies: Any
) -> tuple[Batch, Any, list[Any]]:
    """Queue the copies of a batch on the stream `copies`: arrays, arrival, page-locked memory."""
    import cupy
    import cupyx

    routes: list[tuple[Any, Any]] = []

    def prepare(values: Any) -> Any:
        host = np.asarray(values)
        dtype = backend.dtype if host.dtype.kind == "f" else host.dtype
        locked = cupyx.empty_pinned(host.shape, dtype)
        locked[...] = host
        # CuPy's memory belongs to the stream it was allocated on: here the one that computes.
        routes.append((cupy.empty(host.shape, dtype), locked))
        return routes[-1][0]

    with backend.device:
        arrays = _each_once(batch, prepare)
        # What these blocks of memory held before may still be in use by kernels queued so far.
        free = cupy.cuda.Event(disable_timing=True)
        free.record()
        copies.wait_event(free)
        for array, locked in routes:
            array.set(locked, stream=copies)
        arrival = cupy.cuda.Event(disable_timing=True)
        arrival.record(copies)
    return arrays, arrival, [locked for _, locked in routes]
