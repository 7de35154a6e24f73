"""What a configuration names, made: data on the device, network, optimiser."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import final

import numpy as np

from kfac_np.backend import Array, Backend, Rng, get_backend
from kfac_np.data import Dataset
from kfac_np.errors import ConfigError, FactorizationError, KfacError
from kfac_np.objective import Objective
from kfac_np.optimizers import KFAC, Optimizer
from kfac_np.training.config import Config
from kfac_np.training.loop import Position, Supply, start
from kfac_np.training.metrics import Metrics, Task, evaluate
from kfac_np.trees import Tree

__all__ = ["Experiment"]


@final
@dataclass(frozen=True, eq=False)
class Experiment:
    """What a configuration names, made: data on the device, optimiser, evaluation sets.

    Attributes
    ----------
    config : Config
    dataset : Dataset
    backend : Backend
    optimizer : Optimizer
        With the real objective.
    supply : Supply
    task : {"reconstruction", "classification"}
    test : pair of Array
        Inputs and targets of the test set.

    Examples
    --------
    >>> from kfac_np.training.config import from_table
    >>> table = {"data": {"name": "digits"}, "model": {"sizes": [8]}, "run": {"steps": 1}}
    >>> Experiment.of(from_table(table)).supply.x.shape
    (1500, 64)
    """

    config: Config
    dataset: Dataset
    backend: Backend
    optimizer: Optimizer
    supply: Supply
    task: Task
    test: tuple[Array, Array]

    @classmethod
    def of(cls, config: Config, dataset: Dataset | None = None) -> Experiment:
        """Make everything; `dataset` may be given if it is loaded already."""
        backend = get_backend(config.backend.name, config.backend.dtype)
        dataset = config.data.load() if dataset is None else dataset
        task = config.model.task
        objective = config.model.objective(dataset)
        x, test_x = backend.asarray(dataset.x_train), backend.asarray(dataset.x_test)
        t, test_t = x, test_x
        if task == "classification":
            t, test_t = backend.asarray(dataset.t_train), backend.asarray(dataset.t_test)
        return cls(
            config,
            dataset,
            backend,
            dataclasses.replace(config.optimizer, objective=objective),
            Supply(x, t, config.batch, config.seed),
            task,
            (test_x, test_t),
        )

    def check(self) -> None:
        """Try the gradient and the curvature on two examples, before anything is written.

        A configuration does not show whether its parts go together with its network.

        Raises
        ------
        InputError
            The network or the loss does not take the data.
        CurvatureError
            The curvature is not defined for the network.

        Examples
        --------
        >>> from kfac_np.training.config import from_table
        >>> curvature = {"overrides": {"99": "diagonal"}}
        >>> table = {"data": "digits", "run": {"steps": 1}, "optimizer": {"curvature": curvature}}
        >>> Experiment.of(from_table(table)).check()
        Traceback (most recent call last):
        kfac_np.errors.CurvatureError: overrides: expected paths among 0, 2, ...; got 99
        """
        params, (x, t) = self.start().state.params, (self.supply.x, self.supply.t)
        optimizer, rng = self.optimizer, Rng(self.config.seed, "check")
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            e = optimizer.objective.evaluate(params, x[:2, ...], t[:2, ...], rng=rng)
            e.gradient()
            if isinstance(optimizer, KFAC):
                with contextlib.suppress(FactorizationError):  # of numbers, not of the parts
                    optimizer.curvature.estimate(e, optimizer.fisher, rng)

    @property
    def evaluation_examples(self) -> int:
        """Number of training examples that evaluations use."""
        return min(self.config.run.evaluation_examples, self.supply.x.shape[0])

    def start(self) -> Position:
        """The position before the first step.

        Raises
        ------
        ConfigError
            The parameters do not fit into memory.
        """
        try:
            return start(self.optimizer, self.backend, self.config.seed)
        except (MemoryError, OverflowError, ValueError) as error:
            if isinstance(error, KfacError):
                raise
            raise ConfigError(
                f"model: expected parameters that fit into memory ({error})"
            ) from error

    def loss_at(self, position: Position) -> float:
        """The loss that the next step would find: on its minibatch, without what layers draw."""
        _, x, t = self.supply.next(position.batches, position.step + 1)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return self.optimizer.objective.value(position.state.params, x, t)

    def evaluate(self, params: Tree) -> Metrics:
        """Metrics on the fixed part of the training set."""
        rows = slice(0, self.evaluation_examples)
        x, t = self.supply.x[rows, ...], self.supply.t[rows, ...]
        return evaluate(self.frozen(params), params, x, t, self.task)

    def evaluate_test(self, params: Tree) -> Metrics:
        """Metrics on the test set."""
        return evaluate(self.frozen(params), params, *self.test, self.task)

    def frozen(self, params: Tree) -> Objective:
        """The objective as it is used after training, for these parameters.

        Batch statistics, where the network has such, are those of the first
        ``run.statistics_examples`` training examples (or all), whatever is evaluated.
        """
        rows = slice(0, min(self.config.run.statistics_examples, self.supply.x.shape[0]))
        return self.optimizer.objective.evaluation(params, self.supply.x[rows, ...])
