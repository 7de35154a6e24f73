"""The training loop: minibatches into an optimiser, one step at a time, with a clock."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

from kfac_np import trees
from kfac_np.backend import Array, Backend, Rng, array_namespace, to_numpy
from kfac_np.data import BatchSchedule, BatchState, MiniBatches
from kfac_np.errors import CheckpointError
from kfac_np.optimizers import Optimizer, State, StepReport
from kfac_np.trees import Tree

__all__ = ["Position", "Step", "Supply", "advance", "completed", "start", "train"]


@final
@dataclass(frozen=True, eq=False)
class Supply:
    """Training examples on the device, and the order in which minibatches take them.

    Attributes
    ----------
    x : Array, shape (N, ...)
    t : Array
        Targets.
    schedule : callable
        (k, N) -> size of the minibatch of step k.
    seed : int
        Of the shuffling.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.data import ConstantBatch
    >>> supply = Supply(np.zeros((10, 3)), np.zeros((10, 2)), ConstantBatch(4))
    >>> state, x, t = supply.next(BatchState(), step=1)
    >>> state, x.shape, t.shape
    (BatchState(epoch=0, position=4), (4, 3), (4, 2))
    """

    x: Array
    t: Array
    schedule: BatchSchedule
    seed: int = 0

    def next(self, state: BatchState, step: int) -> tuple[BatchState, Array, Array]:
        """Take the minibatch of a step: the state after it, inputs and targets."""
        n = self.x.shape[0]
        state, indices = MiniBatches(n, self.seed).next(state, self.schedule(step, n))
        where = Backend.of(self.x).asarray(indices)
        xp = array_namespace(self.x)
        x = xp.take(self.x, where, axis=0)
        return state, x, x if self.t is self.x else xp.take(self.t, where, axis=0)


@final
@dataclass(frozen=True, eq=False)
class Position:
    """Where a training run stands: everything that its next steps depend on.

    Attributes
    ----------
    state : State
        Of the optimiser.
    batches : BatchState
    seconds : float
        Spent in steps so far.

    Examples
    --------
    >>> Position(State(params=(), average=None, step=3), BatchState(), 0.5).step
    3
    """

    state: State
    batches: BatchState = dataclasses.field(default_factory=BatchState)
    seconds: float = 0.0

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self.state.step

    @property
    def parameters(self) -> dict[str, Tree]:
        """The parameters to look at: "current", and "averaged" where the optimiser has them."""
        if self.state.average is None:
            return {"current": self.state.params}
        return {"current": self.state.params, "averaged": self.state.average}

    def to_tree(self, optimizer: Optimizer) -> dict[str, Any]:
        """Take the position apart, for a checkpoint."""
        return {
            "optimizer": optimizer.state_to_tree(self.state),
            "batches": dataclasses.asdict(self.batches),
            "seconds": self.seconds,
        }

    @classmethod
    def from_tree(cls, tree: Any, optimizer: Optimizer, where: str = "checkpoint") -> Position:
        """Put a position together again; `where` it comes from is for messages.

        Raises
        ------
        CheckpointError
            The tree is not one of this optimiser's.
        """
        try:
            state = optimizer.state_from_tree(tree["optimizer"])
            return cls(state, BatchState(**tree["batches"]), tree["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            name = type(optimizer).__name__
            raise CheckpointError(f"{where}: expected a state of {name} ({error})") from error


@final
@dataclass(frozen=True, eq=False)
class Step:
    """One step of training: where it led, and what the optimiser says about it.

    Attributes
    ----------
    position : Position
    report : StepReport
    under_way : bool
        Whether an asynchronous device may still be at it, so that reading the report waits,
        and its errors are yet to come (`completed`).

    Examples
    --------
    >>> position = Position(State(params=(), average=None, step=1), seconds=0.25)
    >>> step = Step(position, StepReport(1, 8, {"loss": 0.5, "objective": 0.5}))
    >>> step.record()["seconds"]
    0.25
    """

    position: Position
    report: StepReport
    under_way: bool = False

    def record(self) -> dict[str, Any]:
        """The step as plain values: step, seconds, loss, and the rest of the report."""
        report = self.report.as_dict()
        first = {"step": report.pop("step"), "seconds": self.position.seconds}
        return {**first, **report}


def start(optimizer: Optimizer, backend: Backend, seed: int = 0) -> Position:
    """Draw initial parameters: the position before the first step.

    Examples
    --------
    >>> from kfac_np.backend import get_backend
    >>> from kfac_np.optimizers import SGD
    >>> from kfac_np.training.models import mlp
    >>> start(SGD(mlp((4, 3, 2))), get_backend()).step
    0
    """
    params = optimizer.objective.network.init(Rng(seed, "parameters"), backend)
    return Position(optimizer.init(params))


def advance(optimizer: Optimizer, supply: Supply, position: Position) -> Step:
    """Do one step, or on an asynchronous device ask for it; the clock runs meanwhile.

    Raises
    ------
    DivergenceError
        Loss, gradient or update are not finite; of this step, or on an asynchronous device
        also of the last one, whose position is then not good.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.backend import get_backend
    >>> from kfac_np.optimizers import SGD
    >>> from kfac_np.data import ConstantBatch
    >>> from kfac_np.training.models import mlp
    >>> backend, sgd = get_backend(), SGD(mlp((2, 2)))
    >>> supply = Supply(backend.zeros((4, 2)), np.zeros(4, np.int64), ConstantBatch(4))
    >>> step = advance(sgd, supply, start(sgd, backend))
    >>> step.position.step, step.under_way
    (1, False)
    """
    began = time.perf_counter()
    batches, x, t = supply.next(position.batches, position.step + 1)
    state, report = optimizer.step(position.state, x, t)
    seconds = position.seconds + time.perf_counter() - began
    return Step(Position(state, batches, seconds), report, state.checks is not None)


def completed(step: Step) -> Step:
    """Wait until the device has done the step; the clock runs meanwhile.

    Raises
    ------
    DivergenceError
        As `advance`, of this step; its position is not good.

    Examples
    --------
    >>> step = Step(Position(State((), None, 1)), StepReport(1, 8, {"loss": 0.5}))
    >>> completed(step).position.step
    1
    """
    began, position = time.perf_counter(), step.position
    _wait_for(position.state.params)
    position.state.wait()
    seconds = position.seconds + time.perf_counter() - began
    return Step(dataclasses.replace(position, seconds=seconds), step.report)


def train(optimizer: Optimizer, supply: Supply, position: Position) -> Iterator[Step]:
    """Train for as long as the caller goes on asking for steps.

    The clock runs during steps only, not while the caller evaluates, plots or saves.

    Parameters
    ----------
    optimizer : Optimizer
    supply : Supply
    position : Position
        Of `start`, or of an earlier step: the steps that follow are the same either way.

    Yields
    ------
    Step

    Raises
    ------
    DivergenceError
        Loss, gradient or update are not finite. If it is the loss, the last position yielded is to
        blame, and the one before it is good.

    Examples
    --------
    >>> import itertools
    >>> from kfac_np.backend import get_backend
    >>> from kfac_np.optimizers import SGD
    >>> from kfac_np.data import ConstantBatch, digits
    >>> from kfac_np.training.models import mlp
    >>> backend, data, sgd = get_backend(), digits(), SGD(mlp((64, 32, 10)), rate=0.1)
    >>> x, t = backend.asarray(data.x_train), backend.asarray(data.t_train)
    >>> steps = train(sgd, Supply(x, t, ConstantBatch(50)), start(sgd, backend))
    >>> losses = [step.report.loss for step in itertools.islice(steps, 30)]
    >>> losses[0] > 2.0 > 1.0 > losses[-1]
    True
    """
    while True:
        step = completed(advance(optimizer, supply, position))
        position = step.position
        yield step


def _wait_for(params: Tree) -> None:
    """Let a device finish what was asked of it: copy one number, which needs the last update."""
    for leaf in trees.leaves(params)[-1:]:
        to_numpy(array_namespace(leaf).reshape(leaf, (-1,))[:1])
