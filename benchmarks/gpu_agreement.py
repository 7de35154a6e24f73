"""Does CuPy do the same steps as NumPy here? Every optimiser and curvature, in float64.

    python benchmarks/gpu_agreement.py --steps 12

Prints the largest difference of a parameter after the steps, relative to the largest parameter,
and how long both took; ends with 1 if one exceeds 1e-6. Random targets are drawn on the host, so
that both backends see the same ones.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from kfac_np import (
    EKFAC,
    KFAC,
    SGD,
    Adam,
    BlockTridiagonal,
    Dense,
    Objective,
    Rng,
    Sequential,
    SoftmaxCrossEntropy,
    Tanh,
    get_backend,
    trees,
)
from kfac_np.backend import to_numpy
from kfac_np.layers import Conv, Flatten, MaxPool, ReLU

EXAMPLES, CLASSES, TOLERANCE = 256, 10, 1e-6


def cases() -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Optimisers, and the shapes of an example."""
    dense = Sequential(Dense(64, 100), Tanh(), Dense(100, 40), Tanh(), Dense(40, CLASSES))
    conv = Sequential(
        Conv(1, 8, (3, 3), padding="same"), ReLU(), MaxPool((2, 2)), Flatten(), Dense(128, CLASSES)
    )
    flat, image = Objective(dense, SoftmaxCrossEntropy()), Objective(conv, SoftmaxCrossEntropy())
    return {
        "kfac": (KFAC(flat), (64,)),
        "kfac, convolution": (KFAC(image), (8, 8, 1)),
        "ekfac": (KFAC(flat, curvature=EKFAC()), (64,)),
        "tridiagonal": (KFAC(flat, curvature=BlockTridiagonal()), (64,)),
        "sgd": (SGD(flat, rate=0.1), (64,)),
        "adam": (Adam(flat, rate=0.01), (64,)),
    }


def parameters(optimizer: Any, shape: tuple[int, ...], name: str, steps: int) -> np.ndarray:
    """After some steps on the same batches, as one vector on the host."""
    backend, draws = get_backend(name, "float64"), np.random.default_rng(0)
    state = optimizer.init(optimizer.objective.network.init(Rng(0), backend))
    for _ in range(steps):
        x = backend.asarray(draws.standard_normal((EXAMPLES, *shape)))
        t = backend.asarray(draws.integers(CLASSES, size=EXAMPLES))
        state, _ = optimizer.step(state, x, t)
    state.wait()
    return to_numpy(trees.ravel(state.params))


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    return parser.parse_args(words)


def main() -> int:
    """Print the table."""
    steps = arguments().steps
    bad = 0
    for label, (optimizer, shape) in cases().items():
        began = time.perf_counter()
        expected = parameters(optimizer, shape, "numpy", steps)
        halfway = time.perf_counter()
        found = parameters(optimizer, shape, "cupy", steps)
        seconds = halfway - began, time.perf_counter() - halfway
        error = float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))
        good = error <= TOLERANCE
        bad += not good
        print(
            f"{label:18s} {error:.1e} after {steps} steps; NumPy {seconds[0]:.1f} s, CuPy "
            f"{seconds[1]:.1f} s{'' if good else '  WRONG'}",
            flush=True,
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
