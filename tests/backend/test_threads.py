"""Pieces of work on several threads: the same bits, errors and contexts as on one."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kfac_np.backend import Geometry, Patches, max_pooling, pad, transposed_product
from kfac_np.backend.numpy_kernels import lags, threads, window_maxima
from kfac_np.curvature import BlockDiagonal
from kfac_np.doctor import thread_pools
from kfac_np.errors import ConfigError, FactorizationError, InputError

WAIT = 10.0
"""Seconds after which a thread will not come any more."""


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let so many threads work, on any machine."""
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def use(number: int) -> None:
        monkeypatch.setattr(threads, "_cores", lambda: number)

    use(3)
    return use


def together(number: int) -> Callable[[object], int]:
    """A function that returns its thread, once so many threads are in it."""
    barrier = threading.Barrier(number, timeout=WAIT)

    def meet(_: object) -> int:
        barrier.wait()
        return threading.get_ident()

    return meet


@pytest.mark.parametrize("number", [2, 3])
def test_as_many_threads_as_said_work_at_once(use: Callable[[int], None], number: int):
    use(number)
    assert len(set(threads.in_order(together(number), range(number)))) == number


def test_one_thread_is_the_callers(use: Callable[[int], None]):
    use(1)
    me = threading.get_ident()
    assert list(threads.in_order(lambda _: threading.get_ident(), range(9))) == [me] * 9


def test_results_come_in_order_however_long_each_takes(use: Callable[[int], None]):
    def late(i: int) -> int:
        time.sleep(0.002 * (7 * i % 5))
        return i

    assert list(threads.in_order(late, range(20))) == list(range(20))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 4),
        ({"OMP_NUM_THREADS": "2"}, 2),
        ({"OMP_NUM_THREADS": "3,1"}, 3),
        ({"OMP_NUM_THREADS": "3", "OPENBLAS_NUM_THREADS": "1"}, 1),
        ({"MKL_NUM_THREADS": "64"}, 4),
        ({"OPENBLAS_NUM_THREADS": "many", "OMP_NUM_THREADS": "2"}, 2),
        ({"OPENBLAS_NUM_THREADS": "0"}, 4),
        ({"BLIS_NUM_THREADS": "2"}, 2),
    ],
)
def test_the_environment_says_how_many(
    use: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    expected: int,
):
    use(4)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert threads.count() == expected
    with threads.limited(3):
        assert threads.count() == 3
    assert threads.count() == expected


def test_a_limit_holds_for_blas_and_for_threads_of_threads(use: Callable[[int], None]):
    def blas() -> set[int]:
        return {pool.threads for pool in thread_pools() or () if pool.library != "openmp"}

    before = blas()
    with threads.limited(2):
        meet = together(2)
        assert blas() == {2}
        assert set(threads.in_order(lambda i: (meet(i), threads.count())[1], range(2))) == {2}
        with threads.limited(1), threads.limited(None):
            assert (blas(), threads.count()) == ({1}, 1)
        assert blas() == {2}
    assert blas() == before


def test_a_limit_that_cannot_be_set_is_an_error(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match="threads: expected an integer > 0, got 0"):
        threads.limited(0).__enter__()
    monkeypatch.setattr(threads, "_blas", lambda: None)
    with pytest.raises(ConfigError, match="threads: 2 cannot be set: pip install threadpoolctl"):
        threads.limited(2).__enter__()
    with threads.limited(None):
        assert threads.count() == 1


def test_errors_come_after_the_results_before_them(use: Callable[[int], None]):
    def fail(i: int) -> int:
        if i % 4 == 3:
            raise ValueError(f"part {i}")
        return i

    found: list[int] = []
    with pytest.raises(ValueError, match="part 3"):
        found.extend(threads.in_order(fail, range(50)))
    assert found == [0, 1, 2]
    assert list(threads.in_order(abs, range(9))) == list(range(9))  # the threads live on


def test_nothing_runs_any_more_when_the_caller_stops(use: Callable[[int], None]):
    running = []

    def slow(i: int) -> int:
        running.append(i)
        time.sleep(0.01)
        running.remove(i)
        return i

    results = threads.in_order(slow, range(1000))
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert running == []


def test_few_results_wait_for_a_slow_part(use: Callable[[int], None]):
    begun: list[int] = []

    def work(i: int) -> int:
        begun.append(i)
        if i == 0:
            time.sleep(0.1)
            assert len(begun) <= 6
        return i

    assert list(threads.in_order(work, range(100))) == list(range(100))


def test_floating_point_errors_are_treated_as_the_caller_says(use: Callable[[int], None]):
    meet = together(3)

    def overflow(_: object) -> Any:
        meet(None)
        return np.float32(1e30) * np.full(3, 1e30, dtype=np.float32)

    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        threads.each(overflow, range(3))
    with np.errstate(over="ignore"), warnings.catch_warnings():
        warnings.simplefilter("error")
        threads.each(overflow, range(3))
    with np.errstate(over="warn"), pytest.warns(RuntimeWarning, match="overflow"):
        threads.each(overflow, range(3))


def test_parts_may_have_parts_and_callers_be_many(use: Callable[[int], None]):
    def total(i: int) -> int:
        return sum(threads.in_order(lambda j: i * j, range(10)))

    found: dict[int, list[int]] = {}

    def call(name: int) -> None:
        found[name] = list(threads.in_order(total, range(20)))

    callers = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(WAIT)
    assert found == {name: [45 * i for i in range(20)] for name in range(6)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(use: Callable[[int], None]):
    threads.each(together(3), range(3))
    child = multiprocessing.get_context("fork").Process(
        target=threads.each, args=(together(3), range(3))
    )
    child.start()
    child.join(2 * WAIT)
    alive = child.is_alive()
    child.kill()
    assert not alive
    assert child.exitcode == 0


def kernels() -> dict[str, Callable[[], tuple[Any, ...]]]:
    """What works in pieces, with inputs of more than one piece."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, dtype=np.float32)

    def unpadded(c: int, *kernel: int) -> Patches:
        axes = len(kernel)
        geometry = Geometry(kernel, (1,) * axes, (1,) * axes, ((0, 0),) * axes)
        return Patches(normal(13, *(12,) * axes, c), geometry, True, 2**13)

    few, many, line = unpadded(4, 5, 5), unpadded(32, 5, 5), unpadded(4, 3)
    pool = Geometry((3, 3), (2, 2), (1, 1), ((1, 1), (1, 1)))
    x, g = normal(13, 12, 12, 8), normal(2, 13, 6, 6, 8)
    same = Geometry((5, 5), (1, 1), (1, 1), ((2, 2), (2, 2)))
    found: dict[str, Callable[[], tuple[Any, ...]]] = {}
    grey = unpadded(1, 5, 5)
    for name, p in {"columns": grey, "strips": few, "winograd": many, "line": line}.items():
        m, v = normal(p.shape[2], 32), normal(*p.shape[:2], 32)
        found[f"{name} product"] = lambda p=p, m=m: (p.product(m),)
        found[f"{name} gradient"] = lambda p=p, v=v: (p.gradient(v),)
    found["strips second moment"] = lambda: (few.second_moment(),)
    found["lags second moment"] = lambda: (many.second_moment(),)
    w, dy = normal(32, 25 * 32), normal(13, 12, 12, 32)
    found["input derivative"] = lambda: (transposed_product(dy, w, same, (12, 12), 2**15),)

    def pooled() -> tuple[Any, ...]:
        y, winners = max_pooling.max_pool(x, pool)
        return y, *winners, max_pooling.max_pool_transpose(g, winners, pool, (12, 12))

    found["padding"] = lambda: (pad(x, ((1, 2), (-1, 3))),)
    found["max pooling"] = pooled
    return found


@pytest.mark.parametrize("name", kernels())
def test_the_bits_do_not_depend_on_the_threads(
    name: str, use: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(window_maxima, "CACHE_BYTES", 2**14)
    monkeypatch.setattr(threads, "PIECE_BYTES", 2**12)
    monkeypatch.setattr(lags, "FEWEST_MULTIPLICATIONS", 0)
    parts = []
    in_order = threads.in_order

    def counting(function: Any, each: Any) -> Any:
        each = list(each)
        parts.append(len(each))
        return in_order(function, each)

    monkeypatch.setattr(threads, "in_order", counting)
    kernel = kernels()[name]
    use(1)
    with threads._one_thread_of_blas():
        expected = kernel()
    assert max(parts) > 3
    for number in (2, 3, 3, 3):
        use(number)
        for one, other in zip(kernel(), expected, strict=True):
            np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


def test_side_by_side_keeps_order(use: Callable[[int], None]):
    assert list(threads.side_by_side(str.upper, "acb", 6e9, [])) == ["A", "C", "B"]


def test_the_first_layer_that_cannot_be_factorised_is_named(use: Callable[[int], None]):
    nan = {"A": np.full((9, 9), np.nan), "G": np.eye(9)}
    moments = {"0": nan, "1": {"A": np.full((400, 400), np.nan), "G": np.eye(9)}}
    with pytest.raises(FactorizationError, match="layer 0"):
        BlockDiagonal().factorise(moments, 1e-2)


def test_an_interrupt_while_threads_are_asked_for_leaves_none_behind(
    use: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
):
    pool, handed_out = threads._pool(3), []

    class Interrupted:
        def submit(self, *work: Any) -> Any:
            if handed_out:
                raise KeyboardInterrupt
            handed_out.append(pool.submit(*work))
            return handed_out[0]

    monkeypatch.setattr(threads, "_pool", lambda _: Interrupted())
    with pytest.raises(KeyboardInterrupt):
        list(threads.in_order(str, range(100)))
    assert handed_out[0].done()  # cancelled, or over


def test_side_by_side_uses_threads_for_large_work_on_numpy_arrays_alone(
    use: Callable[[int], None],
):
    use(2)
    large, mine = 2e9, threading.get_ident()
    met = threads.side_by_side(together(2), range(2), large, [np.ones(2)])
    assert len(set(met)) == 2
    for operations, array in ((2.0, np.ones(2)), (large, object())):
        alone = threads.side_by_side(lambda _: threading.get_ident(), range(2), operations, [array])
        assert set(alone) == {mine}


def test_layers_that_are_factorised_side_by_side_are_those_of_one_thread(
    use: Callable[[int], None],
):
    rng = np.random.default_rng(0)

    def spd(n: int) -> np.ndarray:
        x = rng.standard_normal((2 * n, n))
        return x.T @ x / (2 * n)

    moments = {str(i): {"A": spd(n), "G": spd(n + 7)} for i, n in enumerate((150, 20, 170))}
    moments["1"]["A"] -= 5.0 * np.eye(20)  # an event, of the layer in between
    curvature, found = BlockDiagonal(), []
    for number in (1, 3):
        use(number)
        found.append(curvature.factorise(moments, 1e-2))
    (one, events), (many, events_of_many) = found
    assert list(one) == list(many) == list(moments)
    assert events
    assert events == events_of_many
    for path, factors in one.items():
        for name, x in factors.items():
            np.testing.assert_allclose(many[path][name], x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("before", "program", "loaded_with"),
    [
        (None, "import kfac_np", "20"),
        (None, "import numpy, kfac_np", None),
        ("26", "import kfac_np", "26"),
    ],
)
def test_idle_threads_of_openblas_sleep_unless_it_is_too_late_to_say_so(
    before: str | None, program: str, loaded_with: str | None
):
    """OpenBLAS reads the variable as NumPy is loaded; nobody else is to find it changed."""
    name = "OPENBLAS_THREAD_TIMEOUT"
    environment = {k: v for k, v in os.environ.items() if k != name}
    if before is not None:
        environment[name] = before
    code = f"""
        import os, sys
        class Watch:
            def find_spec(self, module, *_):
                if module == "numpy":
                    print(os.environ.get({name!r}))
        sys.meta_path.insert(0, Watch())
        {program}
        print(os.environ.get({name!r}))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split() == [str(loaded_with), str(before)]
