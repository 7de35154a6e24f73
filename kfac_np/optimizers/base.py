"""What an optimiser is, and what every step reports."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self, TypeVar, final

from kfac_np import trees
from kfac_np.backend import (
    Array,
    DeferredChecks,
    Scalar,
    all_finite,
    are_finite,
    array_namespace,
    quiet_methods,
    require_float,
    require_same_place,
    scalar,
    sum_of_squares,
)
from kfac_np.errors import DivergenceError, InputError
from kfac_np.objective import Evaluation, Objective
from kfac_np.optimizers.reports import StepReport
from kfac_np.penalties import Penalty
from kfac_np.trees import Tree
from kfac_np.validation import require_integer

__all__ = ["Optimizer", "State"]


StateType = TypeVar("StateType", bound="State")


@dataclass(frozen=True, eq=False)
class State(ABC):
    """Everything a step needs besides the batch: trees of arrays and plain numbers.

    `like_params` names the fields that are trees like the parameters, where they are not None.

    Attributes
    ----------
    params : tree of Array
    average : tree of Array or None
        Averaged parameters, where the optimiser keeps them.
    step : int
        Steps done.
    checks : DeferredChecks or None
        Conditions of the last step that an asynchronous device has yet to tell.

    Examples
    --------
    >>> from kfac_np.optimizers.sgd import SGDState
    >>> SGDState(params=(), average=None, step=3, velocity=()).step
    3
    """

    like_params: ClassVar[tuple[str, ...]] = ("params", "average")

    params: Tree
    average: Tree | None
    step: int
    checks: DeferredChecks | None = field(default=None, kw_only=True)

    def wait(self) -> None:
        """Raise what the last step would have raised, had its numbers been known.

        The next step does this when it has queued its own work. On other devices than an
        asynchronous one there is nothing to wait for.

        Raises
        ------
        InputError, DivergenceError
            The parameters of this state are those from before the step.
        """
        if self.checks is not None:
            self.checks.wait()


@dataclass(frozen=True)
class Optimizer(ABC):
    """Settings of an optimiser; its state is passed in and out.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.optimizers import SGD
    >>> optimizer = SGD(Objective(Dense(1, 1, bias=False), SquaredError()), rate=0.1, momentum=0.0)
    >>> state = optimizer.init(np.asarray([[2.0]]))
    >>> state, report = optimizer.step(state, np.ones((1, 1)), np.zeros((1, 1)))
    >>> state.params, report.loss
    (array([[1.8]]), 2.0)
    """

    state_type: ClassVar[type[State]] = State

    objective: Objective

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        quiet_methods(cls, "init", "step")

    @abstractmethod
    def init(self, params: Tree) -> Any:
        """The state before the first step.

        Raises
        ------
        InputError
            Parameters that are not finite floats on one device.
        """

    @abstractmethod
    def step(
        self, state: Any, x: Array, t: Array, weights: Array | None = None
    ) -> tuple[Any, StepReport]:
        """Do one step on a mini-batch.

        Parameters
        ----------
        state : State
            As `init` or an earlier step returned it; it is not changed.
        x : Array, shape (N, ...)
        t : Array
            Targets, as the loss takes them.
        weights : Array, shape (N,), optional
            Non-negative weights of the examples.

        Returns
        -------
        state : State
        report : StepReport

        Raises
        ------
        InputError
            A bad batch.
        DivergenceError
            Loss, gradient or update are not finite.

        Notes
        -----
        On an asynchronous device (CuPy), errors that depend on computed numbers
        are raised by the next step or by `State.wait`; the state returned meanwhile holds the
        parameters from before the step. Nothing is waited for but in steps that factorise.
        """

    def check_state(self, state: object) -> None:
        """Raise `InputError` unless `state` is one of this optimiser's, and has what it needs."""
        if not isinstance(state, self.state_type):
            raise InputError(
                f"state: expected a {self.state_type.__name__}, from {type(self).__name__}.init or "
                f"an earlier step, got {type(state).__name__}"
            )
        if state.average is None and getattr(self, "averaging", None) is not None:
            raise InputError(
                f"state: expected an average, which {type(self).__name__} goes on with, got that "
                "of an optimiser with averaging=None; begin one, "
                "dataclasses.replace(state, average=state.params)"
            )

    def state_to_tree(self, state: State) -> dict[str, Any]:
        """The state as nested dicts, tuples, arrays and plain numbers, for a checkpoint."""
        state.wait()
        names = (f.name for f in dataclasses.fields(state) if f.name != "checks")
        return {name: getattr(state, name) for name in names}

    def state_from_tree(self, tree: dict[str, Any]) -> Any:
        """The state that `state_to_tree` took apart; training goes on from it bit for bit.

        Raises
        ------
        InputError
            Entries are missing, or not of a state of this optimiser.
        """
        fields = [f for f in dataclasses.fields(self.state_type) if f.name != "checks"]
        needed = {f.name for f in fields if f.default is dataclasses.MISSING}
        origin = f"state: expected a tree from {type(self).__name__}.state_to_tree"
        if not isinstance(tree, dict):
            raise InputError(f"{origin}, got {tree!r:.80}")
        missing = sorted(needed - set(tree))
        unknown = sorted(map(str, set(tree) - {f.name for f in fields}))
        if missing or unknown:
            told = [f"without {', '.join(missing)}"] if missing else []
            told += [f"with {', '.join(unknown)}"] if unknown else []
            raise InputError(f"{origin}, got one {' and '.join(told)}"[:300])
        require_integer("state: step", tree["step"], zero=True)
        state = self.state_type(**tree)
        self.check_state(state)
        return state


def check_params(params: Tree, penalty: Penalty | None = None) -> None:
    """Raise `InputError` unless all parameters are finite floats of one library and device.

    And unless a penalty, if there is one, is of such parameters.

    Examples
    --------
    >>> import numpy as np
    >>> check_params((np.ones(2), np.asarray([np.nan])))
    Traceback (most recent call last):
    kfac_np.errors.InputError: parameter 1: expected finite values, got NaN or Inf
    """
    named = list(trees.items(params))
    if not named:
        raise InputError("params: expected at least one array, got none")
    for path, p in named:
        name = f"parameter {path}" if path else "params"
        require_float(name, p)
        require_same_place(name, p, named[0][1])
        if not all_finite(p):
            raise InputError(f"{name}: expected finite values, got NaN or Inf")
    if penalty is not None:
        penalty.require_params(params)


@final
@dataclass(frozen=True, eq=False)
class Regularized:
    """Loss and gradient of h(θ) = L(θ) + R(θ) on a mini-batch.

    `statistics` are those that the gradient is the mean of, where there is no penalty R.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> e = Objective(Dense(1, 1, bias=False), SquaredError()).evaluate(
    ...     np.asarray([[2.0]]), np.asarray([[1.0], [3.0]]), np.zeros((2, 1)))
    >>> from kfac_np.penalties import L2
    >>> float(Regularized.of(e, L2(0.5)).value)
    11.0
    """

    loss: Scalar
    value: Scalar
    gradient: Tree
    gradient_norm: Scalar
    statistics: Tree | None

    @classmethod
    def of(cls, e: Evaluation, penalty: Penalty | None) -> Self:
        """Evaluate; whether everything is finite is for `require_finite` to say."""
        loss = e.mean_value
        statistics = e.backward(e.output_gradient())
        gradient = e.mean_gradient(statistics)
        if penalty is None:
            return cls(loss, loss, gradient, norm_of(gradient), statistics)
        gradient = penalty.add_gradient(e.params, gradient)
        value = loss + penalty.value(e.params)
        return cls(loss, value, gradient, norm_of(gradient), None)

    def require_finite(self, step: int, checks: DeferredChecks) -> None:
        """It is a `DivergenceError` if loss, objective or gradient are not finite."""

        def error() -> DivergenceError:
            loss, value = float(self.loss), float(self.value)
            overflows = math.isfinite(loss) and not math.isfinite(value)  # θ does, in the penalty
            what = "objective is inf" if overflows else f"loss is {loss:g}"
            return DivergenceError(
                f"step {step}: the {what} and the gradient's norm {float(self.gradient_norm):g}; "
                "the parameters are unchanged. Use a smaller learning rate or more damping, or "
                "scale the data"
            )

        total = self.value + self.gradient_norm
        checks.require(array_namespace(total).isfinite(total), error)

    @property
    def numbers(self) -> dict[str, Scalar]:
        """Fields of a report."""
        return {"loss": self.loss, "objective": self.value, "gradient_norm": self.gradient_norm}


def norm_of(tree: Tree) -> Scalar:
    """‖v‖ over all entries of a tree.

    Examples
    --------
    >>> import numpy as np
    >>> float(norm_of((np.asarray([3.0]), np.asarray([4.0]))))
    5.0
    """
    square = scalar(sum_of_squares(trees.leaves(tree)))
    return array_namespace(square).sqrt(square)


def moved(params: Tree, update: Tree) -> tuple[Tree, Scalar, Scalar]:
    """θ + δ, ‖δ‖, and whether they are finite.

    Examples
    --------
    >>> import numpy as np
    >>> new, norm, finite = moved((np.ones(1),), (np.asarray([2.0]),))
    >>> new, float(norm), bool(finite)
    ((array([3.]),), 2.0, True)
    """
    new, norm = trees.axpy(1.0, update, params), norm_of(update)
    return new, norm, array_namespace(norm).isfinite(norm) & are_finite(*trees.leaves(new))


def apply_update(
    params: Tree, update: Tree, step: int, checks: DeferredChecks
) -> tuple[Tree, Scalar]:
    """θ + δ and ‖δ‖; it is a `DivergenceError` if they are not finite.

    Examples
    --------
    >>> import numpy as np
    >>> apply_update((np.ones(1),), (np.asarray([2.0]),), 1, DeferredChecks())[0]
    (array([3.]),)
    """
    new, norm, finite = moved(params, update)
    require_finite_update(finite, norm, step, checks)
    return new, norm


def require_finite_update(finite: Scalar, norm: Scalar, step: int, checks: DeferredChecks) -> None:
    """It is a `DivergenceError` unless an update is finite.

    Examples
    --------
    >>> import numpy as np
    >>> require_finite_update(np.bool_(False), np.float64("inf"), 3, DeferredChecks())
    Traceback (most recent call last):
    kfac_np.errors.DivergenceError: step 3: the update's norm is inf; the parameters are ...
    """
    checks.require(
        finite,
        lambda: DivergenceError(
            f"step {step}: the update's norm is {float(norm):g}; the parameters are unchanged. "
            "Use a smaller learning rate or more damping"
        ),
    )


def keep_good(good: State, new: StateType, checks: DeferredChecks) -> StateType:
    """The new state, with the parameters of the good one where a check fails.

    Only on an asynchronous device are there any checks left: the transfer that they wait for is
    started, and the checks about the good state, of a step ago, are waited for.
    """
    hold = checks.hold
    if hold is None:
        return new
    checks.send()
    good.wait()
    params = trees.select(hold, new.params, good.params)
    average = None if new.average is None else trees.select(hold, new.average, good.average)
    return replace(new, params=params, average=average, checks=checks)
