"""Laplace approximations of small networks on tables of numbers, tuned by marginal likelihood.

    python benchmarks/laplace.py                            # four tables, five seeds: minutes
    python benchmarks/laplace.py --data diabetes --structures kron,full --seeds 0

The tables of scikit-learn, a fifth for testing (stratified for classes, split by the seed), inputs
and numeric targets standardised on the training part. Network D-50-C, of digits D-30-C, tanh;
weights N(0, 1/fan-in), biases 0; Adam on all data at once, rate 0.01, 1000 steps, on the loss plus
|θ|²/(2 N). Then one factor of the prior precision, for numbers the noise too, at the maximum of the
marginal likelihood; test NLL of the linearised predictive, of classes by probit. MAP is the network
alone, of numbers with the noise of its training errors.

Structures: kron (weights and biases apart, as in other libraries), joint (K-FAC as it is here),
layers (joint with a prior precision for each layer), ekfac, diagonal, full.
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

from benchmarks.table_data import CLASSES, raw
from kfac_np.applications import FittedCurvature, Laplace, fit_curvature, separate_biases
from kfac_np.curvature import EKFAC, BlockDiagonal, DiagonalBlock, FullMatrix
from kfac_np.layers import Dense, Sequential, Tanh
from kfac_np.losses import SoftmaxCrossEntropy, SquaredError
from kfac_np.objective import Objective
from kfac_np.optimizers import Adam
from kfac_np.trees import Tree

DATA = ("diabetes", "breast_cancer", "wine", "digits")
CURVATURES = {
    "kron": BlockDiagonal(),
    "joint": BlockDiagonal(),
    "layers": BlockDiagonal(),
    "ekfac": EKFAC(),
    "diagonal": BlockDiagonal(DiagonalBlock()),
    "full": FullMatrix(),
}
Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def split(name: str, seed: int) -> Split:
    """x, t for training and x, t for testing."""
    from sklearn.model_selection import train_test_split

    table, classes = raw(name), name in CLASSES
    stratify = table.t if classes else None
    x, x_test, t, t_test = train_test_split(
        table.x, table.t, test_size=0.2, random_state=seed, stratify=stratify
    )

    def standardised(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        deviation = train.std(axis=0)
        deviation = np.where(deviation > 0, deviation, 1.0)
        return (train - train.mean(axis=0)) / deviation, (test - train.mean(axis=0)) / deviation

    x, x_test = standardised(x, x_test)
    if not classes:
        t, t_test = standardised(t, t_test)
    return x, t, x_test, t_test


def trained(name: str, seed: int, data: Split, steps: int) -> tuple[Objective, Tree]:
    """The network at its MAP."""
    x, t = data[:2]
    classes = int(t.max()) + 1 if name in CLASSES else 0
    hidden, outputs = (30 if name == "digits" else 50), classes or t.shape[1]
    network = Sequential(Dense(x.shape[1], hidden), Tanh(), Dense(hidden, outputs))
    objective = Objective(network, SoftmaxCrossEntropy() if classes else SquaredError())
    draws = np.random.default_rng(seed)
    weights = [
        draws.standard_normal((d_out, d_in)) / d_in**0.5
        for d_out, d_in in ((hidden, x.shape[1]), (outputs, hidden))
    ]
    first, last = (np.concatenate([w, np.zeros((len(w), 1))], axis=1) for w in weights)
    adam = Adam(objective, rate=0.01, l2=1.0 / len(x))
    state = adam.init((first, (), last))
    for _ in range(steps):
        state, _ = adam.step(state, x, t)
    return objective, state.params


def map_nll(objective: Objective, params: Tree, data: Split) -> float:
    """Of the network alone."""
    x, t, x_test, t_test = data
    if not isinstance(objective.loss, SquaredError):
        return objective.value(params, x_test, t_test)
    variance = 2.0 * objective.value(params, x, t) / t.shape[1]
    loss = objective.value(params, x_test, t_test)
    return loss / variance + 0.5 * t.shape[1] * float(np.log(2.0 * np.pi * variance))


def fitted(objective: Objective, params: Tree, data: Split, structure: str) -> FittedCurvature:
    """The curvature of the training part."""
    fit = fit_curvature(objective, params, [data[:2]], CURVATURES[structure])
    return separate_biases(objective, fit) if structure == "kron" else fit


def measure(name: str, seed: int, structures: Sequence[str], steps: int) -> list[dict[str, Any]]:
    """One line for each structure."""
    data = split(name, seed)
    objective, params = trained(name, seed, data, steps)
    lines = []
    for structure in structures:
        began = time.process_time()
        fit = fitted(objective, params, data, structure)
        laplace = Laplace(objective, fit).tuned(per_layer=structure == "layers")
        nll = laplace.predict(data[2]).nll(data[3])
        prior = laplace.prior_precision
        lines.append(
            {
                "map": map_nll(objective, params, data),
                "nll": nll,
                "evidence": laplace.log_marginal_likelihood,
                "prior": prior if isinstance(prior, float) else float("nan"),
                "noise": laplace.noise,
                "seconds": time.process_time() - began,
            }
        )
    return lines


def report(name: str, structures: Sequence[str], seeds: Sequence[int], steps: int) -> None:
    """Means over the seeds, and the first of them."""
    found = [measure(name, seed, structures, steps) for seed in seeds]
    for i, structure in enumerate(structures):
        lines = [each[i] for each in found]
        mean = {key: float(np.mean([line[key] for line in lines])) for key in lines[0]}
        one = lines[0]
        noise = f"{mean['noise']:.3f}" if name not in CLASSES else ""
        print(
            f"{name:14}{structure:9}{mean['map']:9.4f}{mean['nll']:9.4f}{mean['evidence']:10.2f}"
            f"{mean['prior']:7.2f} {noise:6}{one['evidence']:11.3f}{one['nll']:9.5f}"
            f"{mean['seconds']:8.2f}",
            flush=True,
        )


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default=",".join(DATA), metavar="A,B,...")
    parser.add_argument("--structures", default=",".join(CURVATURES), metavar="A,B,...")
    parser.add_argument("--seeds", default="0,1,2,3,4", metavar="N,N,...")
    parser.add_argument("--steps", type=int, default=1000)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Print a table."""
    flags = arguments(words)
    names, structures = flags.data.split(","), flags.structures.split(",")
    unknown = [n for n in names if n not in DATA] + [s for s in structures if s not in CURVATURES]
    if unknown:
        raise SystemExit(
            f"expected data of {', '.join(DATA)}, structures of {', '.join(CURVATURES)}, got "
            f"{', '.join(unknown)}"
        )
    first = f"{'log evidence':>11}{'NLL':>8}"
    print(
        f"{'data':14}{'structure':9}{'MAP NLL':>9}{'NLL':>9}{'evidence':>10}{'prior':>7} "
        f"{'noise':6}{first:>20}{'CPU s':>8}\n{'':56}(of the first seed)"
    )
    for name in names:
        report(name, structures, [int(seed) for seed in flags.seeds.split(",")], flags.steps)


if __name__ == "__main__":
    main()
