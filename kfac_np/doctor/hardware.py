"""What arrays are computed with on the host: BLAS, its kernels and threads; and rates of products.

Everything is looked at from inside a process, so `measure` is also what a program that is slow
may call on itself. The command ``kfac-np doctor`` calls it in fresh processes whose environment
differs by one variable.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np

from kfac_np.backend.array import get_backend
from kfac_np.errors import ConfigError

__all__ = [
    "Pool",
    "built_with",
    "denormal_slowdown",
    "gemm_error",
    "gemm_rates",
    "measure",
    "pool_switching",
    "thread_pools",
]

_OWNERS = {"numpy": "NumPy", "scipy": "SciPy", "torch": "PyTorch", "sklearn": "scikit-learn"}


@final
@dataclass(frozen=True)
class Pool:
    """A library that keeps threads of its own in this process.

    Attributes
    ----------
    owner : str
        Who brought it: NumPy, SciPy, ...; or "system".
    library : str
        openblas, mkl, blis, openmp, ...
    version, kernels, threading : str or None
        Its version, the processor that its kernels are for, and its kind of threads.
    threads : int
    file : str
        Name of the shared library, without its directory.

    Examples
    --------
    >>> Pool("NumPy", "openblas", "0.3.30", "SkylakeX", "pthreads", 2, "libopenblas.so").threads
    2
    """

    owner: str
    library: str
    version: str | None
    kernels: str | None
    threading: str | None
    threads: int
    file: str


def thread_pools() -> tuple[Pool, ...] | None:
    """Return the BLAS and OpenMP libraries loaded so far; None if threadpoolctl is missing.

    Examples
    --------
    >>> pools = thread_pools()
    >>> pools is None or all(pool.threads >= 1 for pool in pools)
    True
    """
    if importlib.util.find_spec("threadpoolctl") is None:
        return None
    found = importlib.import_module("threadpoolctl").threadpool_info()
    return tuple(
        Pool(
            _owner(one["filepath"]),
            one["internal_api"],
            one["version"],
            one.get("architecture"),
            one.get("threading_layer"),
            one["num_threads"],
            os.path.basename(one["filepath"]),
        )
        for one in found
    )


def _owner(path: str) -> str:
    """Whose package a library lies in: `.../numpy.libs/libscipy_openblas64_.so` is NumPy's."""
    for folder in reversed(os.path.normpath(path).split(os.sep)[:-1]):
        owner = _OWNERS.get(folder.partition(".")[0])
        if owner is not None:
            return owner
    return "system"


def built_with() -> str:
    """Return name and version of the BLAS that NumPy was built with.

    Examples
    --------
    >>> isinstance(built_with(), str)
    True
    """
    try:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    except (KeyError, TypeError):
        return "unknown"
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()


def gemm_rates(n: int, seconds: float, backend: str = "numpy") -> tuple[float, float]:
    """2 n³ / time of float32 products of two n×n matrices: of the fastest one, and of all together.

    Parameters
    ----------
    n : int
    seconds : float
        How long to go on; at least two products are made, the first of which is not counted.
    backend : {"numpy", "cupy", ...}

    Returns
    -------
    fastest, sustained : float
        GFLOP/s. Other programs make a product only ever slower: the first is what the machine can
        do, the second what there is left of it now.

    Examples
    --------
    >>> fastest, sustained = gemm_rates(64, 0.01)
    >>> fastest >= sustained > 0.0
    True
    """
    place = get_backend(backend)
    host = np.random.default_rng(0).standard_normal((n, n), dtype=np.float32)
    a = place.asarray(host)
    calls = 1 if backend == "numpy" else max(1, 4096**3 // n**3)  # waiting for a GPU takes time

    def products() -> None:
        for _ in range(calls):
            c = a @ a
        float(c[0, 0])  # waits

    fastest, mean = _times(products, seconds)
    return 2e-9 * n**3 * calls / fastest, 2e-9 * n**3 * calls / mean


def gemm_error(n: int = 250, backend: str = "numpy") -> float:
    """max |C - A B| / (n eps) of a float32 product against float64: about 1 or less if all is well.

    Examples
    --------
    >>> gemm_error(50) < 10.0
    True
    """
    draws = np.random.default_rng(0)
    a = draws.uniform(-1.0, 1.0, (n, n + 3)).astype(np.float32)  # odd sizes have remainder loops
    b = draws.uniform(-1.0, 1.0, (n + 3, n + 1)).astype(np.float32)
    place = get_backend(backend)
    c = place.xp.astype(place.asarray(a) @ place.asarray(b), place.xp.float64)
    exact = np.einsum("ij,jk->ik", a.astype(np.float64), b.astype(np.float64))
    error = place.xp.max(place.xp.abs(c - place.asarray(exact, place.xp.float64)))
    return float(error) / (n * float(np.finfo(np.float32).eps))


def denormal_slowdown() -> float | None:
    """Time to multiply numbers below 1.2e-38 / time for usual ones; None if they become zero.

    Examples
    --------
    >>> slowdown = denormal_slowdown()
    >>> slowdown is None or slowdown > 0.0
    True
    """
    usual = np.full(20_000, 0.5, dtype=np.float32)
    tiny = usual * np.float32(1e-39)
    if float(tiny[0]) == 0.0:
        return None
    out = np.empty_like(usual)

    def seconds(x: np.ndarray[Any, Any]) -> float:
        return _times(lambda: np.multiply(x, np.float32(0.75), out=out), 0.01)[0]

    return seconds(tiny) / seconds(usual)


def pool_switching(seconds: float) -> float | None:
    """Time of products by NumPy and SciPy in turn / the time of each by itself.

    SciPy's wheels bring a BLAS of their own. Its threads wait busily for a while after each
    product, on the cores that NumPy's would use.

    Returns
    -------
    float or None
        About 1 where they do not disturb each other; None without SciPy.

    Examples
    --------
    >>> ratio = pool_switching(0.01)
    >>> ratio is None or ratio > 0.0
    True
    """
    if importlib.util.find_spec("scipy") is None:
        return None
    product = importlib.import_module("scipy.linalg.blas").sgemm
    a = np.random.default_rng(0).standard_normal((500, 500), dtype=np.float32)
    by_column = np.asfortranarray(a)

    def first() -> None:
        np.matmul(a, a)

    def second() -> None:
        product(1.0, by_column, by_column)

    def both() -> None:
        first()
        second()

    alone, apart, mixed = (_times(f, seconds / 3)[0] for f in (first, second, both))
    return mixed / (alone + apart)


def measure(
    sizes: Sequence[int], seconds: float, backend: str = "numpy", scipy: bool = False
) -> Mapping[str, Any]:
    """Measure this process; the result is JSON-able.

    Parameters
    ----------
    sizes : sequence of int
        Of the matrices whose products are timed.
    seconds : float
        For all of them together.
    backend : {"numpy", "cupy", ...}
    scipy : bool
        Whether to load SciPy's linear algebra as well, and to take turns with it.

    Returns
    -------
    dict
        "rates" and "sustained": size -> GFLOP/s, as `gemm_rates`; "processors": how many it had
        meanwhile, on average; "error" as `gemm_error`; "pools" as `thread_pools`; with `scipy`,
        "switching" as `pool_switching`.

    Raises
    ------
    ConfigError
        The backend cannot be used.

    Examples
    --------
    >>> sorted(measure([32], 0.01))
    ['error', 'pools', 'processors', 'rates', 'sustained']
    """
    if not sizes or seconds <= 0.0:
        raise ConfigError(f"measure: expected sizes and a time, got {sizes!r} and {seconds!r}")
    found: dict[str, Any] = {"error": gemm_error(backend=backend)}
    began, used = time.perf_counter(), time.process_time()
    rates = {str(n): gemm_rates(n, seconds / len(sizes), backend) for n in sizes}
    found["processors"] = (time.process_time() - used) / (time.perf_counter() - began)
    found["rates"] = {n: fastest for n, (fastest, _) in rates.items()}
    found["sustained"] = {n: sustained for n, (_, sustained) in rates.items()}
    if scipy:
        found["switching"] = pool_switching(seconds)
    pools = thread_pools()
    found["pools"] = None if pools is None else [asdict(pool) for pool in pools]
    return found


def _times(call: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Of the fastest call, and of all on average; one before them is not counted."""
    call()
    began, best, calls = time.perf_counter(), float("inf"), 0
    last = began
    while True:
        call()
        now, calls = time.perf_counter(), calls + 1
        best, last = min(best, now - last), now
        if now >= began + seconds:
            return best, (now - began) / calls
