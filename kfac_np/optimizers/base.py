"""What an optimiser is, and what every step reports."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

from kfac_np import trees
from kfac_np.backend import Array, all_finite, require_float, require_same_place
from kfac_np.curvature import LadderEvent
from kfac_np.errors import ConfigError, DivergenceError, InputError
from kfac_np.objective import Evaluation, Objective
from kfac_np.trees import Tree

__all__ = ["Optimizer", "State", "StepReport"]


@final
@dataclass(frozen=True)
class StepReport:
    """What happened in one step; None where it does not apply.

    Attributes
    ----------
    step : int
        Number of this step, from 1.
    batch_size : int
    loss : float
        Mean over the mini-batch's loss terms, before the step.
    objective : float
        The loss plus the ℓ2 term (η/2)‖θ‖², before the step.
    gradient_norm, update_norm : float
        ‖∇h‖ and ‖δ‖ over all parameters.
    damping : float
        λ used in this step.
    gamma : float
        γ used in this step; the factors were damped by γ² ≈ λ + η.
    alpha, mu : float
        Coefficients of the proposal and of the previous update: δ = αΔ + μδ₀. For SGD and Adam
        alpha is the learning rate.
    model_decrease : float
        M(δ) - M(0), negative when the quadratic model predicts progress.
    rho : float
        Reduction ratio, in steps that measured it.
    refreshed : tuple of str
        Paths whose factors were recomputed.
    events : tuple of LadderEvent
        Factorisations that did not succeed as asked, and updates that were rejected.

    Examples
    --------
    >>> StepReport(step=1, batch_size=8, loss=0.5, objective=0.5).as_dict()["loss"]
    0.5
    """

    step: int
    batch_size: int
    loss: float
    objective: float
    gradient_norm: float | None = None
    update_norm: float | None = None
    damping: float | None = None
    gamma: float | None = None
    alpha: float | None = None
    mu: float | None = None
    model_decrease: float | None = None
    rho: float | None = None
    refreshed: tuple[str, ...] = ()
    events: tuple[LadderEvent, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, ready for JSON."""
        out = dataclasses.asdict(self)
        out["refreshed"] = list(self.refreshed)
        out["events"] = [str(event) for event in self.events]
        return out


@dataclass(frozen=True, eq=False)
class State(ABC):
    """Everything a step needs besides the batch: trees of arrays and plain numbers.

    Attributes
    ----------
    params : tree of Array
    average : tree of Array or None
        Averaged parameters, where the optimiser keeps them.
    step : int
        Steps done.

    Examples
    --------
    >>> from kfac_np.optimizers.sgd import SGDState
    >>> SGDState(params=(), average=None, step=3, velocity=()).step
    3
    """

    params: Tree
    average: Tree | None
    step: int


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
        """

    def check_state(self, state: object) -> None:
        """Raise `InputError` unless `state` is one of this optimiser's."""
        if not isinstance(state, self.state_type):
            raise InputError(
                f"state: expected a {self.state_type.__name__}, from {type(self).__name__}.init or "
                f"an earlier step, got {type(state).__name__}"
            )

    def state_to_tree(self, state: State) -> dict[str, Any]:
        """The state as nested dicts, tuples, arrays and plain numbers, for a checkpoint."""
        return {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}

    def state_from_tree(self, tree: dict[str, Any]) -> Any:
        """The state that `state_to_tree` took apart; training goes on from it bit for bit."""
        return self.state_type(**tree)


def require_part(name: str, value: object, kind: type, *, optional: bool = False) -> None:
    """Raise `ConfigError` unless `value` is a `kind` (or None, if that may be).

    Examples
    --------
    >>> require_part("KFAC averaging", 0.99, State, optional=True)
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: KFAC averaging: expected a State or None, got 0.99
    """
    if not isinstance(value, kind) and not (optional and value is None):
        article = "an" if kind.__name__[0] in "AEIO" else "a"
        raise ConfigError(
            f"{name}: expected {article} {kind.__name__}{' or None' if optional else ''}, "
            f"got {value!r}"
        )


def check_params(params: Tree) -> None:
    """Raise `InputError` unless all parameters are finite floats of one library and device.

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
        require_float(f"parameter {path}", p)
        require_same_place(f"parameter {path}", p, named[0][1])
        if not all_finite(p):
            raise InputError(f"parameter {path}: expected finite values, got NaN or Inf")


@final
@dataclass(frozen=True, eq=False)
class Regularized:
    """Loss and gradient of h(θ) = L(θ) + (η/2)‖θ‖² on a mini-batch.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> e = Objective(Dense(1, 1, bias=False), SquaredError()).evaluate(
    ...     np.asarray([[2.0]]), np.ones((1, 1)), np.zeros((1, 1)))
    >>> Regularized.of(e, 0.5, 1).value
    3.0
    """

    loss: float
    value: float
    gradient: Tree
    gradient_norm: float

    @classmethod
    def of(cls, e: Evaluation, l2: float, step: int) -> Self:
        """Evaluate; raise `DivergenceError` if anything is not finite."""
        loss = e.value
        gradient = e.gradient()
        if l2:
            gradient = trees.axpy(l2, e.params, gradient)
        norm = math.sqrt(float(trees.squared_norm(gradient)))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise DivergenceError(
                f"step {step}: the loss is {loss:g} and the gradient's norm {norm:g}; the "
                "parameters are unchanged. Use a smaller learning rate or more damping"
            )
        return cls(loss, loss + l2_term(e.params, l2), gradient, norm)


def l2_term(params: Tree, l2: float) -> float:
    """(η/2) ‖θ‖².

    Examples
    --------
    >>> import numpy as np
    >>> l2_term((np.ones(4),), 0.5)
    1.0
    """
    return 0.5 * l2 * float(trees.squared_norm(params)) if l2 else 0.0


def apply_update(params: Tree, update: Tree, step: int) -> tuple[Tree, float]:
    """θ + δ and ‖δ‖; raise `DivergenceError` if they are not finite.

    Examples
    --------
    >>> import numpy as np
    >>> apply_update((np.ones(1),), (np.asarray([2.0]),), 1)
    ((array([3.]),), 2.0)
    """
    new = trees.axpy(1.0, update, params)
    norm = math.sqrt(float(trees.squared_norm(update)))
    if not math.isfinite(norm) or not all_finite(*trees.leaves(new)):
        raise DivergenceError(
            f"step {step}: the update's norm is {norm:g}; the parameters are unchanged. "
            "Use a smaller learning rate or more damping"
        )
    return new, norm
