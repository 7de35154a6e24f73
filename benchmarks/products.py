"""What a step's matrix products take by themselves, at their own shapes, with NumPy's BLAS.

    python benchmarks/products.py W1-256-fixed W3

A limit closer than the roofline: a product of 256 rows does not run at the rate of the largest one,
whoever calls it. No step that consists of calls of `np.matmul` takes less than this sum, were
everything else free, so that a peer's step divided by it is the highest ratio there can be. Dense
layers only; each product is warm, with nothing between its calls, and the median of some. Inverses
are left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kfac_np  # noqa: F401 - sets what OpenBLAS reads when NumPy loads it

import numpy as np  # isort: skip

from benchmarks.workloads import Affine, Workload, select

Product = Callable[[], object]


def products(w: Workload, layer: Affine, first: bool) -> list[tuple[str, Product]]:
    """The parts of a step that a layer's products belong to, and functions that form them."""
    draws = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray:
        return draws.standard_normal(shape, dtype=np.float32)

    n, part, model = (round(w.batch * f) for f in (1.0, w.statistics_fraction, w.model_fraction))
    a, b = layer.d_in + 1, layer.d_out
    W, A, G, x, g = array(b, a), array(a, a), array(b, b), array(n, a), array(n, b)
    weights, inputs = W[:, :-1], x[:, :-1]
    found: list[tuple[str, Product]] = [
        ("forward", lambda: inputs @ weights.T),
        ("gradient", lambda: g.T @ x),
        ("moments", lambda: (x[:part].T @ x[:part], g[:part].T @ g[:part])),
    ]
    if n * (a * a + b * b + a * b) < a * b * (a + b):
        found.append(("solve", lambda: (g @ G).T @ (x @ A)))
    else:
        found.append(("solve", lambda: G @ W @ A))
    if not first:
        found.append(("backward", lambda: g @ weights))
        found.append(("sampled backward", lambda: g[:part] @ weights))
    if w.model == "exact":
        times = 2 if first else 4  # the tangents of the weights and of the inputs, two vectors
        found.append(("model", lambda: [inputs[:model] @ weights.T for _ in range(times)]))
    return found


def milliseconds(product: Product, times: int) -> float:
    """The median of so many calls, after one."""
    product()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        product()
        found.append(1e3 * (time.perf_counter() - began))
    return statistics.median(found)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("workloads", nargs="+")
    parser.add_argument("--times", type=int, default=15)
    args = parser.parse_args(words)
    if args.times < 1:
        parser.error(f"--times: expected at least 1, got {args.times}")
    args.chosen = select(args.workloads)
    for w in args.chosen:
        if w.network.channels:
            parser.error(f"{w.name}: expected a network of dense layers")
    return args


def main() -> None:
    """Time the products of each workload, and print them."""
    args = arguments()
    for w in args.chosen:
        spent: dict[str, float] = {}
        for i, layer in enumerate(w.network.affine()):
            for part, product in products(w, layer, i == 0):
                spent[part] = spent.get(part, 0.0) + milliseconds(product, args.times)
        print(f"{w.name}: products alone {sum(spent.values()):.1f} ms")
        for part, ms in spent.items():
            gflop = w.operations()[part] / 1e9
            print(f"    {part:17s}{ms:7.1f} ms{gflop:8.2f} GFLOP{1e3 * gflop / ms:6.0f} GFLOP/s")


if __name__ == "__main__":
    main()
