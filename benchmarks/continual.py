"""Permuted images in ten tasks: what is left of the earlier ones.

    OPENBLAS_NUM_THREADS=1 python benchmarks/continual.py

Each task has the pixels of all images in another order. One network learns task after task with
Adam, and sees the data of the present one only; what holds it is the penalty
(λ/2) Σ_i (θ - θ_T)ᵀ C_i (θ - θ_T) of the curvatures fitted after each task. Prints test accuracy in
per cent, mean over the tasks learned so far, for each structure and λ.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np

from kfac_np import Adam, Dense, Objective, ReLU, Rng, Sequential, SoftmaxCrossEntropy, get_backend
from kfac_np.applications import ewc, fit_curvature
from kfac_np.curvature import BlockDiagonal, DiagonalBlock
from kfac_np.data import BatchState, MiniBatches, first, load

CURVATURES = {"K-FAC": BlockDiagonal(), "diagonal": BlockDiagonal(DiagonalBlock())}
BATCH, EPOCHS, FITTED = 200, 4, 1000


def run(data, name: str, strength: float, tasks: int, seed: int) -> list[float]:
    """Mean test accuracy over the tasks so far, after each of them."""
    backend, pixels = get_backend("numpy"), data.x_train.shape[1]
    network = Sequential(Dense(pixels, 100), ReLU(), Dense(100, 100), ReLU(), Dense(100, 10))
    objective = Objective(network, SoftmaxCrossEntropy())
    params, fits, found = network.init(Rng(seed), backend), [], []
    orders = [Rng(seed, "task", task).permutation(pixels) for task in range(tasks)]
    t = backend.asarray(data.t_train)
    for task, order in enumerate(orders):
        x = backend.asarray(data.x_train[:, order])
        penalty = ewc(*fits, strength=strength, online=True) if fits else None
        optimizer, position = Adam(objective, rate=2e-3, penalty=penalty), BatchState()
        state = optimizer.init(params)
        for _ in range(EPOCHS * len(x) // BATCH):
            position, rows = MiniBatches(len(x), seed + task).next(position, BATCH)
            state, _ = optimizer.step(state, x[rows], t[rows])
        params = state.params
        if name in CURVATURES:
            part = [(x[:FITTED], t[:FITTED])]
            fits.append(fit_curvature(objective, params, part, CURVATURES[name]))
        right = [
            np.mean(np.argmax(network.forward(params, data.x_test[:, o])[0], 1) == data.t_test)
            for o in orders[: task + 1]
        ]
        found.append(100.0 * float(np.mean(right)))
    return found


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--strengths", type=float, nargs="+", default=[10, 100])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def main() -> None:
    """Learn the tasks with each structure and strength; print a table."""
    flags = arguments()
    data = first(load(flags.data), 5000, 2000) if flags.data != "digits" else load("digits")
    shown = sorted({1, flags.tasks // 2, flags.tasks})
    print("| | λ | " + " | ".join(f"after task {k}" for k in shown) + " | seconds |")
    print("|---" * (3 + len(shown)) + "|")
    for name in ("none", *CURVATURES):
        for strength in flags.strengths if name != "none" else [0.0]:
            began = time.process_time()
            curve = run(data, name, strength, flags.tasks, flags.seed)
            row = " | ".join(f"{curve[k - 1]:.1f}" for k in shown)
            spent = time.process_time() - began
            print(f"| {name} | {strength:g} | {row} | {spent:.0f} |", flush=True)


if __name__ == "__main__":
    main()
