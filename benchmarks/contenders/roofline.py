"""The largest rate of matrix products, and of copies, that this machine shows in the same run."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.contenders.child import Running, Setup, serve

SIZES = (1024, 2048)
CUDA_SIZES = (4096, 8192)
COPIED = 2**26  # numbers


def build(setup: Setup) -> Running:
    """NumPy's products on the host, CuPy's on a GPU."""
    import numpy

    if setup.device == "cuda":
        import cupy as xp

        wait: Any = xp.cuda.Device().synchronize
    else:
        xp, wait = numpy, lambda: None
    sizes = SIZES if setup.device == "cpu" else CUDA_SIZES
    sizes = tuple(setup.options.get("sizes", sizes))
    rates: dict[str, list[float]] = {f"gemm {n}": [] for n in sizes}
    rates["copy"] = []
    matrices = {n: xp.full((n, n), 0.5, dtype=setup.dtype) for n in sizes}
    source = xp.ones(COPIED // (16 if setup.device == "cpu" else 1), dtype=setup.dtype)
    target = xp.zeros_like(source)

    def seconds(function: Any) -> float:
        wait()
        began = time.perf_counter()
        function()
        wait()
        return time.perf_counter() - began

    def copy() -> None:
        target[...] = source

    outs = {n: xp.empty_like(m) for n, m in matrices.items()}
    for n, m in matrices.items():
        xp.matmul(m, m, out=outs[n])

    def step() -> str:
        for n, m in matrices.items():
            best = min(seconds(lambda m=m, n=n: xp.matmul(m, m, out=outs[n])) for _ in range(3))
            rates[f"gemm {n}"].append(2.0 * n**3 / best)
        best = min(seconds(copy) for _ in range(3))
        rates["copy"].append(2.0 * source.nbytes / best)
        return ""

    return Running(step, None, lambda: {"rates": rates})


if __name__ == "__main__":
    serve({"numpy": "pip install numpy"}, build, "numpy cupy-cuda12x")
