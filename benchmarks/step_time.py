"""Seconds per optimisation step on the 784-1000-500-250-30 autoencoder, and where they go.

    python benchmarks/step_time.py                       # NumPy
    python benchmarks/step_time.py --backend cupy --out benchmarks/results/NAME.json

The contenders take turns, one step each, so that other load on the machine meets all of them;
medians over the rounds. Data are random numbers: a step takes the same time on any data.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np

from kfac_np import Backend, Rng, get_backend, practical, published, trees
from kfac_np.backend import to_numpy
from kfac_np.layers import Tanh, fan_in_normal
from kfac_np.optimizers import SGD, Adam, Optimizer
from kfac_np.training.models import autoencoder


def contenders() -> dict[str, Optimizer]:
    """Optimisers by name, on one objective."""
    objective = autoencoder((784, 1000, 500, 250, 30), Tanh(), fan_in_normal)
    return {
        "sgd": SGD(objective, rate=1e-3),
        "adam": Adam(objective, rate=1e-3),
        "kfac-fixed": practical(objective, rate=1e-3),
        "kfac": published(objective),
    }


def gemm_rate(backend: Backend, n: int = 2048) -> float:
    """Operations a second of the largest matrix product of this run."""
    a = Rng(0).normal((n, n), backend)
    best = min(_timed(lambda: a @ a) for _ in range(5))
    return 2 * n**3 / best


def _timed(function) -> float:
    began = time.perf_counter()
    result = function()
    to_numpy(result[:1, :1])  # wait for the device
    return time.perf_counter() - began


def measure(backend: Backend, batch: int, rounds: int, warm: int = 3) -> dict[str, list[float]]:
    """Seconds of each step after the first few, which compile kernels and fill pools."""
    x = Rng(1).uniform((batch, 784), backend)
    optimizers = contenders()
    params = optimizers["sgd"].objective.network.init(Rng(0), backend)
    states = {name: optimizer.init(params) for name, optimizer in optimizers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for k in range(warm + rounds):
        for name, optimizer in optimizers.items():
            began = time.perf_counter()
            states[name], _ = optimizer.step(states[name], x, x)
            to_numpy(trees.leaves(states[name].params)[-1][:1, :1])
            if k >= warm:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def main() -> None:
    """Measure, print a table, and write the numbers if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=40, help="20 hold one refresh of K-FAC")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    backend = get_backend(args.backend, args.dtype)
    peak = gemm_rate(backend)
    seconds = measure(backend, args.batch, args.rounds)
    peak = max(peak, gemm_rate(backend))
    print(f"{args.backend} {args.dtype}, batch {args.batch}; matrix product {peak / 1e9:.0f} GF/s")
    print(f"{'':12}{'median ms':>12}{'mean ms':>12}{'sgd = 1':>12}")
    base = statistics.median(seconds["sgd"])
    for name, times in seconds.items():
        median, mean = statistics.median(times), statistics.mean(times)
        print(f"{name:12}{1e3 * median:12.2f}{1e3 * mean:12.2f}{median / base:12.2f}")
    if args.out:
        record = {
            "command": f"python benchmarks/step_time.py --backend {args.backend} --dtype "
            f"{args.dtype} --batch {args.batch} --rounds {args.rounds}",
            "date": time.strftime("%Y-%m-%d"),
            "versions": {"python": platform.python_version(), "numpy": np.__version__},
            "processor": platform.machine(),
            "matrix_product_gflops": peak / 1e9,
            "seconds": seconds,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
