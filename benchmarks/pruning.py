"""Test accuracy against the share of parameters removed, for several ways to choose them.

    OPENBLAS_NUM_THREADS=1 python benchmarks/pruning.py
    OPENBLAS_NUM_THREADS=1 python benchmarks/pruning.py --data fashion-mnist

A network is trained and pruned in rounds, the curvature fitted anew in each to examples of the
training set; nothing is trained afterwards. Prints a table for each kind of removal: test accuracy
in per cent, mean over the seeds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np

from kfac_np import KFAC, Dense, Objective, ReLU, Rng, Sequential, SoftmaxCrossEntropy, get_backend
from kfac_np.applications import fit_curvature, prune
from kfac_np.curvature import EKFAC, BlockDiagonal, DiagonalBlock
from kfac_np.data import BatchState, Dataset, MiniBatches, load
from kfac_np.errors import InputError

SIZES = {"digits": (64, 100, 50, 10), "fashion-mnist": (784, 100, 50, 10)}
STEPS = {"digits": (80, 1500), "fashion-mnist": (200, 2000)}  # of training, and their batches
EXAMPLES = 3_000  # that the curvature is fitted to, at most
KFAC_CURVATURE, DIAGONAL = BlockDiagonal(), BlockDiagonal(DiagonalBlock())
WAYS = {
    "K-FAC, OBS": (KFAC_CURVATURE, "obs"),
    "EKFAC, OBS": (EKFAC(), "obs"),
    "K-FAC, OBD": (KFAC_CURVATURE, "obd"),
    "diagonal": (DIAGONAL, "obs"),
    "magnitude": (DIAGONAL, "magnitude"),
}
PRODUCTS = {"weighted SVD": (KFAC_CURVATURE, "rank"), "EigenDamage": (EKFAC(), "eigenvectors")}
LINES = (0.5, 0.7, 0.9)
SHARES = {"weights": (0.8, 0.9, 0.95), "units": LINES, "inputs": LINES, "products": LINES}


class Trained:
    """A network after training, and what its predictions are worth."""

    def __init__(self, data: Dataset, seed: int) -> None:
        backend, (steps, size) = get_backend("numpy"), STEPS[data.name]
        widths = list(zip(SIZES[data.name][:-1], SIZES[data.name][1:], strict=True))
        network = Sequential(*[x for a, b in widths for x in (Dense(a, b), ReLU())][:-1])
        self.objective = Objective(network, SoftmaxCrossEntropy())
        x, t = backend.asarray(data.x_train), backend.asarray(data.t_train)
        self.test = backend.asarray(data.x_test), data.t_test
        self.batches = [
            (x[i : i + 1000], t[i : i + 1000]) for i in range(0, min(EXAMPLES, len(x)), 1000)
        ]
        optimizer = KFAC(self.objective, l2=1e-4, seed=seed)
        state, position = optimizer.init(network.init(Rng(seed), backend)), BatchState()
        for _ in range(steps):
            position, rows = MiniBatches(len(x), seed).next(position, size)
            state, _ = optimizer.step(state, x[rows], t[rows])
        self.params = state.params

    def accuracy(self, objective: Objective, params) -> float:
        """In per cent, on test images."""
        z = objective.network.forward(params, self.test[0])[0]
        return 100.0 * float(np.mean(np.argmax(z, axis=1) == self.test[1]))

    def curve(self, curvature, remove: str, method: str, shares, rounds: int) -> list[float]:
        """Accuracy at each share; NaN where so much cannot go."""
        fit = fit_curvature(self.objective, self.params, self.batches, curvature)
        found = []
        for share in shares:
            try:
                p = prune(
                    self.objective,
                    fit,
                    share,
                    remove=remove,
                    method=method,
                    rounds=rounds,
                    batches=self.batches,
                )
            except InputError:
                found.append(np.nan)
            else:
                found.append(self.accuracy(p.objective, p.params))
        return found


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=SIZES, default="digits")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=SHARES, default=list(SHARES))
    return parser.parse_args(words)


def main() -> None:
    """Train and prune for each seed; print the tables."""
    flags = arguments()
    data, began = load(flags.data), time.process_time()
    networks = [Trained(data, seed) for seed in range(flags.seeds)]
    whole = np.mean([n.accuracy(n.objective, n.params) for n in networks])
    shown = "-".join(map(str, SIZES[data.name]))
    told = f"{whole:.1f} % before; {flags.rounds} rounds, seeds: {len(networks)}"
    print(f"{data.name}, {shown}: {told}")
    for kind in flags.kinds:
        shares = SHARES[kind]
        print(f"\n| {kind} removed | " + " | ".join(f"{s:.0%}" for s in shares) + " |")
        print("|---" * (1 + len(shares)) + "|")
        ways = WAYS if kind != "products" else PRODUCTS
        for name, (curvature, choice) in ways.items():
            remove, method = (kind, choice) if kind != "products" else (choice, "obs")
            rounds = flags.rounds if kind != "products" else 1
            curves = [n.curve(curvature, remove, method, shares, rounds) for n in networks]
            row = " | ".join(f"{value:.1f}" for value in np.mean(curves, axis=0))
            print(f"| {name} | {row} |", flush=True)
    print(f"\n{time.process_time() - began:.0f} processor seconds")


if __name__ == "__main__":
    main()
