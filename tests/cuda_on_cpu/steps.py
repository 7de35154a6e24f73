"""How often a step of K-FAC waits for the GPU, and how many kernels it launches, by kind of step.

    tests/cuda_on_cpu/run tests/cuda_on_cpu/steps.py [--places] [--write] [--steps N] [NAME...]

NAME is one of mlp, conv, ekfac, tridiagonal; all of them if there is none. --places adds where in
the library it waits, and what launches most; --write makes what is counted the bounds that
tests/optimizers/test_cupy_counts.py holds the library to.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from cuda_on_cpu import Counts, count

import kfac_np
from kfac_np import KFAC, Dense, Objective, Rng, Sequential, SoftmaxCrossEntropy, Tanh, get_backend
from kfac_np.layers import Conv, Flatten, MaxPool, ReLU

EXAMPLES, CLASSES, STEPS = 512, 10, 20
BOUNDS = Path(__file__).with_name("bounds.json")


def dense_network() -> Sequential:
    return Sequential(Dense(64, 32), Tanh(), Dense(32, 16), Tanh(), Dense(16, CLASSES))


def mlp() -> tuple[KFAC, tuple[int, ...]]:
    return KFAC(Objective(dense_network(), SoftmaxCrossEntropy())), (64,)


def conv() -> tuple[KFAC, tuple[int, ...]]:
    network = Sequential(
        Conv(1, 4, (3, 3), padding="same"),
        ReLU(),
        MaxPool((2, 2)),
        Flatten(),
        Dense(64, CLASSES),
    )
    return KFAC(Objective(network, SoftmaxCrossEntropy())), (8, 8, 1)


def ekfac() -> tuple[KFAC, tuple[int, ...]]:
    objective = Objective(dense_network(), SoftmaxCrossEntropy())
    return KFAC(objective, curvature=kfac_np.EKFAC()), (64,)


def tridiagonal() -> tuple[KFAC, tuple[int, ...]]:
    objective = Objective(dense_network(), SoftmaxCrossEntropy())
    return KFAC(objective, curvature=kfac_np.BlockTridiagonal()), (64,)


CASES: dict[str, Callable[[], tuple[KFAC, tuple[int, ...]]]] = {
    f.__name__: f for f in (mlp, conv, ekfac, tridiagonal)
}


def kind_of(optimizer: KFAC, k: int) -> str:
    """What step k does besides the usual."""
    if k == 1:
        return "first"
    parts = {
        "γ search": optimizer.gamma.searches(k),
        "refresh": optimizer.refresh.due(k) or optimizer.gamma.searches(k),
        "λ": optimizer.damping.measures(k),
    }
    return " + ".join(name for name, there in parts.items() if there) or "steady"


def measured(optimizer: KFAC, shape: tuple[int, ...], steps: int) -> Iterator[tuple[int, Counts]]:
    """Steps on random numbers, with what each of them did."""
    backend, rng = get_backend("cupy"), np.random.default_rng(0)
    x = backend.asarray(rng.standard_normal((EXAMPLES, *shape)))
    t = backend.asarray(rng.integers(CLASSES, size=EXAMPLES))
    state = optimizer.init(optimizer.objective.network.init(Rng(0), backend))
    reports = []  # one that is dropped unread waits for its numbers
    library = next(iter(kfac_np.__path__))
    for k in range(1, steps + 1):
        with count(library, depth=2) as counts:
            state, report = optimizer.step(state, x, t)
            reports.append(report)
        yield k, counts


def counted(name: str, steps: int = STEPS) -> dict[str, tuple[int, Counts]]:
    """Of each kind of step the number of the last one, and what it did."""
    optimizer, shape = CASES[name]()
    return {kind_of(optimizer, k): (k, c) for k, c in measured(optimizer, shape, steps)}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--places", action="store_true")
    parser.add_argument("--write", action="store_true", help=f"to {BOUNDS.name}")
    parser.add_argument("--steps", type=int, default=STEPS)
    wanted = parser.parse_args()
    if unknown := set(wanted.names) - set(CASES):
        sys.exit(f"expected {', '.join(CASES)}; got {', '.join(sorted(unknown))}")
    bounds = json.loads(BOUNDS.read_text()) if BOUNDS.exists() else {}
    print(f"{'':12s} {'step':>4s}  {'kind':24s}{'waits':>6s}{'launches':>9s}{'BLAS etc.':>10s}")
    for name in wanted.names or CASES:
        last = counted(name, wanted.steps)
        bounds[name] = {kind: [c.waits, c.launches] for kind, (_, c) in last.items()}
        for kind, (k, counts) in last.items():
            numbers = f"{counts.waits:6d}{counts.launches:9d}{counts.total('library'):10d}"
            print(f"{name:12s} {k:4d}  {kind:24s}{numbers}", flush=True)
            if wanted.places:
                for event, most in (("wait", None), ("launch", 8)):
                    for place, n in counts.by_place(event).most_common(most):
                        print(f"{n:12d} {event:6s} {place}")
    if wanted.write:
        rows = [f'"{name}": {json.dumps(b, ensure_ascii=False)}' for name, b in bounds.items()]
        BOUNDS.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
