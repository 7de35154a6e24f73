"""One run: a table, an optimiser, a second of one core. What happened, as a line of numbers.

The network is 64-32 ReLU with the loss that fits the targets: softmax cross-entropy, sigmoid
cross-entropy of one logit for two classes, or half the squared error summed over outputs. Every
optimiser starts from the same parameters, scikit-learn's included, and every loss is that of this
library on the whole table.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.table_data import Table, load
from kfac_np import (
    EKFAC,
    KFAC,
    Adam,
    Objective,
    Rng,
    SigmoidCrossEntropy,
    SoftmaxCrossEntropy,
    SquaredError,
    get_backend,
)
from kfac_np.errors import KfacError
from kfac_np.layers import Dense, ReLU, Sequential

HIDDEN = (64, 32)


@dataclass(frozen=True)
class Cell:
    """Where a run takes place. `batch` is 0 for the whole table."""

    data: str
    units: str
    dtype: str
    batch: int
    seed: int

    @property
    def name(self) -> str:
        """As --only takes it."""
        return f"{self.data}/{self.units}/{self.dtype}/{self.batch or 'all'}/{self.seed}"


@dataclass(frozen=True)
class Problem:
    """The table as arrays, and where the optimisers start."""

    objective: Objective
    params: Any
    x: np.ndarray
    t: np.ndarray
    labels: np.ndarray
    batch: int
    seed: int

    @classmethod
    def of(cls, cell: Cell) -> Problem:
        """Network, loss, data and start."""
        table = load(cell.data, cell.units, cell.seed)
        backend = get_backend("numpy", cell.dtype)
        objective = objective_for(table)
        t = table.t
        if table.classes in (0, 2):
            t = t.reshape(len(t), -1).astype(cell.dtype)
        return cls(
            objective,
            objective.network.init(Rng(cell.seed), backend),
            table.x.astype(cell.dtype),
            t,
            table.t if table.classes else t,
            min(cell.batch or len(t), len(t)),
            cell.seed,
        )

    def loss(self, params: Any) -> float:
        """On the whole table; infinite if it is not a number, or an error."""
        try:
            value = float(self.objective.evaluate(params, self.x, self.t).value)
        except KfacError:
            return math.inf
        return math.inf if math.isnan(value) else value

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Shuffled anew in every pass, all of the same size."""
        draws = np.random.default_rng(self.seed)
        order = np.empty(0, np.int64)
        while self.batch == len(self.x):
            yield self.x, self.t
        while True:
            if len(order) < self.batch:
                order = np.concatenate([order, draws.permutation(len(self.x))])
            chosen, order = order[: self.batch], order[self.batch :]
            yield self.x[chosen], self.t[chosen]


def objective_for(table: Table) -> Objective:
    """The network and the loss for these targets."""
    outputs = (1 if table.classes == 2 else table.classes) or table.t.shape[1]
    sizes = (table.x.shape[1], *HIDDEN, outputs)
    layers: list[Any] = []
    for d_in, d_out in itertools.pairwise(sizes):
        layers += [Dense(d_in, d_out), ReLU()]
    losses = {0: SquaredError(), 2: SigmoidCrossEntropy()}
    return Objective(Sequential(*layers[:-1]), losses.get(table.classes, SoftmaxCrossEntropy()))


# Each of these yields (steps so far, parameters, averaged parameters or None).
Training = Iterator[tuple[int, Any, Any]]


def ours(make: Callable[[Objective], Any]) -> Callable[[Problem], Training]:
    """An optimiser of this library, in the loop that its README shows."""

    def train(problem: Problem) -> Training:
        optimizer = make(problem.objective)
        state = optimizer.init(problem.params)
        for x, t in problem.batches():
            state, report = optimizer.step(state, x, t)
            yield report.step, state.params, state.average

    return train


def sklearn_model(problem: Problem, **settings: Any) -> Any:
    """scikit-learn's network of the same shape, that starts where ours does."""
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    start = iter([p for p in problem.params if not isinstance(p, tuple)])
    kind = MLPRegressor if isinstance(problem.objective.loss, SquaredError) else MLPClassifier

    class Started(kind):  # type: ignore[misc, valid-type]
        def _init_coef(self, *_: Any) -> tuple[np.ndarray, np.ndarray]:
            W = next(start)
            return np.array(W[:, :-1].T), np.array(W[:, -1])

    settings |= {"hidden_layer_sizes": HIDDEN, "activation": "relu", "alpha": 0.0}
    return Started(random_state=problem.seed, **settings)


def params_of(model: Any, problem: Problem) -> Any:
    """Its parameters as ours."""
    pairs = zip(model.coefs_, model.intercepts_, strict=True)
    matrices = iter([np.concatenate([W.T, b[:, None]], axis=1) for W, b in pairs])
    return tuple(
        p if isinstance(p, tuple) else next(matrices).astype(p.dtype) for p in problem.params
    )


def _labels(problem: Problem) -> np.ndarray:
    t = problem.labels
    return t[:, 0] if t.ndim == 2 and t.shape[1] == 1 else t


def sklearn_adam(problem: Problem) -> Training:
    """A pass over the table at a time."""
    model = sklearn_model(problem, solver="adam", batch_size=problem.batch)
    t = _labels(problem)
    known = {} if isinstance(problem.objective.loss, SquaredError) else {"classes": np.unique(t)}
    steps = 0
    while True:
        model.partial_fit(problem.x, t, **known)
        steps += math.ceil(len(problem.x) / problem.batch)
        yield steps, params_of(model, problem), None


def sklearn_lbfgs(problem: Problem) -> Training:
    """Rounds of L-BFGS, each twice as long as the last, which begins without a memory each time."""
    iterations = 8
    settings = {"solver": "lbfgs", "warm_start": True, "tol": 0.0, "max_fun": 10**9}
    model = sklearn_model(problem, **settings)
    steps = 0
    while True:
        model.set_params(max_iter=iterations)
        model.fit(problem.x, _labels(problem))
        steps += model.n_iter_
        yield steps, params_of(model, problem), None
        if model.n_iter_ <= 1:
            return  # nothing left to gain
        iterations = min(2 * iterations, 256)


OPTIMIZERS: dict[str, Callable[[Problem], Training]] = {
    "kfac": ours(KFAC),
    "ekfac": ours(lambda objective: KFAC(objective, curvature=EKFAC())),
    "adam-0.001": ours(lambda objective: Adam(objective, rate=1e-3)),
    "adam-0.01": ours(lambda objective: Adam(objective, rate=1e-2)),
    "sklearn-adam": sklearn_adam,
    "sklearn-lbfgs": sklearn_lbfgs,
}


def run(cell: Cell, optimizer: str, seconds: float, steps: int | None = None) -> dict[str, Any]:
    """Train for so many processor seconds of steps, or for so many steps, and tell what came of it.

    The loss on the whole table is taken after each of the first ten steps and then at every tenth
    part more of them, which does not count as time.
    """
    problem = Problem.of(cell)
    line: dict[str, Any] = {**asdict(cell), "optimizer": optimizer}
    first = worst = problem.loss(problem.params)
    done, failed, params, average, spent, seen = 0, None, problem.params, None, 0.0, -1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        training = OPTIMIZERS[optimizer](problem)
        while spent < seconds if steps is None else done < steps:
            began = time.process_time()
            try:
                done, params, average = next(training)
            except StopIteration:
                break
            except Exception as error:  # any error is a failure of the run, not of the suite
                failed = f"{type(error).__name__}: {error}"
                break
            finally:
                spent += time.process_time() - began
            if done <= 10 or done >= 1.1 * seen:
                seen = done
                worst = max(worst, problem.loss(params))
        last = problem.loss(params)
        averaged = None if average is None else problem.loss(average)
    if failed is None and not math.isfinite(last):
        failed = f"the loss is {last}"
    losses = {"first": first, "final": last, "worst": max(worst, last), "averaged": averaged}
    line |= {k: v if v is None or math.isfinite(v) else None for k, v in losses.items()}
    return line | {"steps": done, "seconds": round(spent, 3), "failed": failed}
