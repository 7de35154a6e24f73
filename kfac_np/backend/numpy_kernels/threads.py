"""Work cut into pieces, on as many threads of Python as BLAS has.

NumPy lets go of the interpreter's lock in products, copies and elementwise functions. BLAS can
only make use of one core for products as small as those of `kfac_np.backend.numpy_kernels.strips`;
all cores are busy when each thread works on examples of its own. Meanwhile BLAS is held to one
thread a product: its threads and these would wait for each other.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import array_api_compat

from kfac_np.errors import ConfigError
from kfac_np.validation import require_integer

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

__all__ = ["available", "count", "each", "in_order", "limited", "said", "side_by_side"]

Part = TypeVar("Part")
Result = TypeVar("Result")

VARIABLES = (
    "OPENBLAS_NUM_THREADS",
    "GOTO_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
"""What tells BLAS how many threads to use: the first that is set counts."""
SMALL = 1e7
"""Operations that take less time than threads need to take turns."""
PIECE_BYTES = 2**20
"""Of what is only moved or added up: pieces that stay in the cache of a core."""
_limit: contextvars.ContextVar[int | None] = contextvars.ContextVar("threads", default=None)


def count() -> int:
    """How many threads may work at once: as many as BLAS may use, and no more than cores.

    As many as `limited` says, or else the environment. One where threadpoolctl is missing, without
    which BLAS cannot be held to one thread.

    Examples
    --------
    >>> count() >= 1
    True
    """
    number, limit, variable = _cores(), _limit.get(), said()
    if limit is not None:
        return min(limit, number)
    if variable is not None:
        number = min(variable[1], number)
    return number if number == 1 or available() else 1


def said() -> tuple[str, int] | None:
    """Return the environment variable that says how many threads to use, and what it says.

    Examples
    --------
    >>> name, number = said() or ("none", 1)
    >>> number >= 1
    True
    """
    for name in VARIABLES:
        value = os.environ.get(name, "").partition(",")[0].strip()  # OpenMP: one for each level
        if value.isdecimal() and int(value) > 0:
            return name, int(value)
    return None


def available() -> bool:
    """Tell whether the threads of BLAS can be set: by threadpoolctl, for a BLAS that it knows.

    Examples
    --------
    >>> available() in (True, False)
    True
    """
    return _blas() is not None


@contextlib.contextmanager
def limited(number: int | None) -> Iterator[None]:
    """Within it, BLAS and this library work on so many threads, whatever the environment says.

    The threads of BLAS belong to the process, those of this library to the context of the caller.

    Parameters
    ----------
    number : int or None
        With None nothing changes.

    Raises
    ------
    ConfigError
        The threads of BLAS cannot be set.

    Examples
    --------
    >>> with limited(1):
    ...     count()
    1
    """
    if number is None:
        yield
        return
    require_integer("threads", number)
    if not available():
        raise ConfigError(
            f"threads: {number} cannot be set: pip install threadpoolctl (or set "
            f"{VARIABLES[0]} before Python starts)"
        )
    token = _limit.set(number)
    try:
        with _blas().limit(limits=number):
            yield
    finally:
        _limit.reset(token)


def in_order(function: Callable[[Part], Result], parts: Iterable[Part]) -> Iterator[Result]:
    """`map`, on several threads: the same results in the same order, whatever their number.

    The caller's thread works, too, and so never waits for a thread that has not begun: calls from
    several threads at once, or from within a part, cannot block each other. Each thread has one
    part at a time. Errors come where `map` has them; parts after that may have been worked on.

    Parameters
    ----------
    function : callable
        Sees the context of the caller (`numpy.errstate`).
    parts : iterable

    Yields
    ------
    What `function` returns for each part.

    Examples
    --------
    >>> list(in_order(abs, [3, -2, -1]))
    [3, 2, 1]
    """
    todo = deque(enumerate(parts))
    number, threads = len(todo), min(count(), len(todo))
    if threads <= 1:
        return (function(part) for _, part in todo)
    return _in_order(function, todo, number, threads)


def each(function: Callable[[Part], object], parts: Iterable[Part]) -> None:
    """Call the function with every part, as `in_order` does.

    Examples
    --------
    >>> found = set()
    >>> each(found.add, [1, 2, 3])
    >>> found
    {1, 2, 3}
    """
    for _ in in_order(function, parts):
        pass


def side_by_side(
    function: Callable[[Part], Result],
    parts: Iterable[Part],
    operations: float,
    arrays: Iterable[Any],
) -> Iterator[Result]:
    """`in_order`, where there is much to do and all of it on NumPy's arrays; elsewhere `map`.

    Other libraries have threads or a device of their own.

    Parameters
    ----------
    function : callable
    parts : iterable
    operations : float
        About how many all parts take together.
    arrays : iterable of Array
        What `function` works on.

    Yields
    ------
    What `function` returns for each part.

    Examples
    --------
    >>> list(side_by_side(abs, [-1, 3], 2.0, []))
    [1, 3]
    """
    if operations < SMALL or not all(array_api_compat.is_numpy_array(x) for x in arrays):
        return map(function, parts)
    return in_order(function, parts)


def _in_order(
    function: Callable[[Part], Result], todo: deque[tuple[int, Part]], number: int, threads: int
) -> Iterator[Result]:
    from queue import SimpleQueue

    done: dict[int, tuple[Any, BaseException | None]] = {}
    news: SimpleQueue[None] = SimpleQueue()
    room = threading.Semaphore(2 * threads)  # so that results do not heap up behind a slow part

    def work_once() -> bool:
        try:
            i, part = todo.popleft()
        except IndexError:
            return False
        try:
            done[i] = function(part), None
        except BaseException as error:
            done[i] = None, error
        return True

    def help_out() -> None:
        while room.acquire() and work_once():
            news.put(None)

    pool = _pool(_cores())
    helpers: list[Future[None]] = []
    with _one_thread_of_blas():
        try:
            helpers.extend(  # one by one: an interrupt does not lose those that are there
                pool.submit(contextvars.copy_context().run, help_out) for _ in range(threads - 1)
            )
            for i in range(number):
                while i not in done:
                    if not (room.acquire(blocking=False) and work_once()):
                        news.get()  # another thread has it
                result, error = done.pop(i)
                room.release()
                if error is not None:
                    raise error
                yield result
        finally:
            todo.clear()
            room.release(threads)
            for helper in helpers:
                if not helper.cancel():  # it has begun, and may still be writing
                    helper.result()


@contextlib.contextmanager
def _one_thread_of_blas() -> Iterator[None]:
    """A limit of the whole process: of callers at the same time the first one sets it."""
    owner = _limiting()
    if not owner.acquire(blocking=False):
        yield
        return
    try:
        with _blas().limit(limits=1):
            yield
    finally:
        owner.release()


@functools.cache
def _blas() -> Any:
    """What sets the threads of BLAS; None where that is not possible."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return None
    library = importlib.import_module("threadpoolctl")
    found = library.ThreadpoolController().select(user_api="blas")
    return found if found.lib_controllers else None


@functools.cache
def _limiting() -> threading.Lock:
    return threading.Lock()


def _cores() -> int:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def _pool(cores: int) -> Executor:
    """Threads that are started when there is work, and joined when the interpreter exits."""
    from concurrent.futures import ThreadPoolExecutor

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of the threads
    return ThreadPoolExecutor(max(1, cores - 1), "kfac_np")
