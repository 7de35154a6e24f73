"""Influence functions: do they foretell training on other data, and what do they take?

    python benchmarks/influence.py            # the linear datamodelling score on diabetes
    python benchmarks/influence.py --speed    # 10,000 × 100 scores of a classifier
    python benchmarks/influence.py --speed --examples 1000 --kronfluence /path/to/python

The score is that of docs/influence.md, which has the protocol. Times are those of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from kfac_np import Dense, Objective, Rng, Sequential, SoftmaxCrossEntropy, SquaredError, Tanh
from kfac_np.applications import (
    Influence,
    MeanEigenvalue,
    fit_curvature,
    linear_datamodelling_score,
)
from kfac_np.backend import get_backend
from kfac_np.curvature import (
    EKFAC,
    BlockDiagonal,
    BlockTridiagonal,
    DiagonalBlock,
    ExactBlock,
    FullMatrix,
)
from kfac_np.fisher import Empirical, Exact
from kfac_np.layers import ReLU
from kfac_np.optimizers import Adam

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

# name: curvature, Fisher type, damping
TENTH = MeanEigenvalue(0.1)
METHODS = {
    "no curvature": (BlockDiagonal(DiagonalBlock()), Empirical(), 1e6),
    "diagonal, empirical": (BlockDiagonal(DiagonalBlock()), Empirical(), TENTH),
    "K-FAC, empirical": (BlockDiagonal(), Empirical(), TENTH),
    "EKFAC, empirical": (EKFAC(), Empirical(), TENTH),
    "K-FAC": (BlockDiagonal(), Exact(), TENTH),
    "EKFAC": (EKFAC(), Exact(), TENTH),
    "block-tridiagonal": (BlockTridiagonal(split=True), Exact(), TENTH),
    "exact blocks, empirical": (BlockDiagonal(ExactBlock()), Empirical(), TENTH),
    "exact blocks": (BlockDiagonal(ExactBlock()), Exact(), TENTH),
    "whole matrix": (FullMatrix(), Exact(), TENTH),
    "whole matrix, weight decay": (FullMatrix(), Exact(), 0.01),
}
SUBSETS, INITIALISATIONS, QUERIES, STEPS, DECAY = 50, (100, 101, 102), 50, 500, 0.01


def diabetes():
    """Training and test parts, in units of the training part."""
    from sklearn.datasets import load_diabetes
    from sklearn.model_selection import train_test_split

    x, t = load_diabetes(return_X_y=True)
    x, x_test, t, t_test = train_test_split(x, t[:, None], test_size=0.2, random_state=0)
    means, deviations = (x.mean(0), t.mean(0)), (x.std(0), t.std(0))
    return tuple(
        (a - means[i % 2]) / deviations[i % 2] for i, a in enumerate((x, t, x_test, t_test))
    )


def trained(objective: Objective, x, t, seed: int):
    """Parameters after training from an initialisation."""
    draws = np.random.default_rng(seed)
    params = []
    for layer in objective.network.layers:
        if isinstance(layer, Dense):
            w = draws.standard_normal((layer.d_out, layer.d_in)) / layer.d_in**0.5
            params.append(np.concatenate([w, np.zeros((layer.d_out, 1))], axis=1))
        else:
            params.append(())
    adam = Adam(objective, rate=0.01, l2=DECAY)
    state = adam.init(tuple(params))
    for _ in range(STEPS):
        state, _ = adam.step(state, x, t)
    return state.params


def datamodelling() -> dict[str, list[float]]:
    """Mean correlation over the queries, of each method and each of five trained networks."""
    x, t, x_test, t_test = diabetes()
    queries = x_test[:QUERIES], t_test[:QUERIES]
    objective = Objective(Sequential(Dense(10, 32), Tanh(), Dense(32, 1)), SquaredError())
    draws = np.random.default_rng(1234)
    chosen = [draws.permutation(len(x))[: len(x) // 2] for _ in range(SUBSETS)]
    subsets = np.stack([np.isin(np.arange(len(x)), rows).astype(float) for rows in chosen])
    losses = []
    for i, rows in enumerate(chosen):
        each = []
        for seed in INITIALISATIONS:
            z, _ = objective.network.forward(
                trained(objective, x[rows], t[rows], seed), queries[0], None
            )
            each.append(objective.loss.value(z, queries[1]))
        losses.append(np.mean(each, axis=0))
        print(f"\rtrained on {i + 1} of {SUBSETS} halves", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    for seed in range(5):
        params = trained(objective, x, t, seed)
        for name, (curvature, fisher, damping) in METHODS.items():
            fit = fit_curvature(objective, params, [(x, t)], curvature, fisher)
            scores = Influence(objective, fit, damping).scores(queries, (x, t))
            score = linear_datamodelling_score(scores, subsets, np.stack(losses))
            found[name].append(float(score.mean()))
    return found


def images(n: int):
    """Inputs with correlations, and labels: their values change no time."""
    draws = np.random.default_rng(0)
    x = draws.standard_normal((n, 30)) @ draws.standard_normal((30, 784))
    x = (0.3 * (x + draws.standard_normal(x.shape))).astype(np.float32)
    return x, draws.integers(0, 10, n)


def speed(kind: str, examples: int) -> dict[str, float]:
    """Seconds of the processor to fit and to score, and the largest memory in MB."""
    backend = get_backend("numpy", "float32")
    layers = Dense(784, 1000), ReLU(), Dense(1000, 500), ReLU(), Dense(500, 10)
    objective = Objective(Sequential(*layers), SoftmaxCrossEntropy())
    params, (x, t) = objective.network.init(Rng(0), backend), images(examples)
    batches = [(x[i : i + 1000], t[i : i + 1000]) for i in range(0, examples, 1000)]
    curvature = {"kfac": BlockDiagonal(), "ekfac": EKFAC()}[kind]
    before = time.process_time()
    fit = fit_curvature(objective, params, batches, curvature, Empirical())
    between = time.process_time()
    Influence(objective, fit).scores((x[:100], t[:100]), (x, t))
    return measured(before, between)


def measured(before: float, between: float) -> dict[str, float]:
    """What is reported of a process that fitted a curvature, and then scored."""
    return {
        "fit": between - before,
        "scores": time.process_time() - between,
        "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def in_process(python: str, *words: str) -> dict[str, float]:
    """A measurement in a process of its own, which prints it as its last line."""
    environment = os.environ | dict.fromkeys(THREADS, "1")
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    command = [python, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument(
        "--kronfluence", metavar="PYTHON", help="with kronfluence 1.0.1 and PyTorch"
    )
    parser.add_argument("--one", choices=("kfac", "ekfac"), help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> None:
    flags = arguments()
    if flags.one:
        print(json.dumps(speed(flags.one, flags.examples)))
        return
    if not flags.speed:
        print(f"{'':28}  score  deviation")
        for name, each in datamodelling().items():
            print(f"{name:28}  {np.mean(each):5.3f}  {np.std(each):9.3f}")
        return
    here, number = str(Path(__file__).resolve()), str(flags.examples)
    rows = {("kfac_np", k): (sys.executable, here, "--one", k) for k in ("kfac", "ekfac")}
    if flags.kronfluence:
        peer = str(Path(__file__).with_name("influence_kronfluence.py"))
        rows |= {
            ("kronfluence", k): (flags.kronfluence, peer, "--one", k) for k in ("kfac", "ekfac")
        }
    print(f"{number} examples × 100 queries, processor seconds      fit   scores     MB")
    for (who, kind), words in rows.items():
        found = in_process(*words, "--examples", number)
        times = f"{found['fit']:8.1f} {found['scores']:8.1f} {found['MB']:6.0f}"
        print(f"{who + ', ' + kind:45} {times}", flush=True)


if __name__ == "__main__":
    main()
