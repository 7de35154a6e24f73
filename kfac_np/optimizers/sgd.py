"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from kfac_np import trees
from kfac_np.backend import Array, DeferredChecks, Rng, Scalar
from kfac_np.objective import Objective
from kfac_np.optimizers.averaging import IterateAverage
from kfac_np.optimizers.base import (
    Optimizer,
    Regularized,
    State,
    apply_update,
    check_params,
    keep_good,
)
from kfac_np.optimizers.reports import StepReport
from kfac_np.optimizers.schedules import Schedule, require_rate, value_at
from kfac_np.penalties import Penalty, penalized
from kfac_np.trees import Tree
from kfac_np.validation import (
    plain_fields,
    require_flag,
    require_in,
    require_instance,
    require_integer,
    require_positive,
)

__all__ = ["SGD", "SGDState"]


@final
@dataclass(frozen=True, eq=False)
class SGDState(State):
    """State of `SGD`: besides the parameters the velocity.

    Examples
    --------
    >>> SGDState(params=(), average=None, step=0, velocity=()).step
    0
    """

    like_params: ClassVar[tuple[str, ...]] = ("params", "average", "velocity")

    velocity: Tree


@final
@dataclass(frozen=True)
class SGD(Optimizer):
    """v ← μ v - α ∇h; θ ← θ + v (heavy ball), or θ ← θ + μ v - α ∇h (Nesterov).

    Parameters
    ----------
    objective : Objective
    rate : float or Schedule
        α.
    momentum : float
        μ, in [0, 1).
    nesterov : bool
        Nesterov's momentum in the form that needs the gradient at θ only.
    l2 : float
        η: h = loss + (η/2)‖θ‖².
    averaging : IterateAverage, optional
    seed : int
        Of what layers draw in training (Dropout).
    penalty : Penalty, optional
        R: h = loss + (η/2)‖θ‖² + R(θ), of `kfac_np.penalties`.

    References
    ----------
    Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning",
    §2 (eq. 1-4).

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> sgd = SGD(Objective(Dense(1, 1, bias=False), SquaredError()), rate=0.1)
    >>> state = sgd.init(np.asarray([[1.0]]))
    >>> for _ in range(100):
    ...     state, report = sgd.step(state, np.ones((1, 1)), np.zeros((1, 1)))
    >>> report.loss < 1e-3
    True
    """

    state_type: ClassVar[type[State]] = SGDState

    rate: float | Schedule = 0.01
    momentum: float = 0.9
    nesterov: bool = True
    l2: float = 0.0
    averaging: IterateAverage | None = None
    seed: int = 0
    penalty: Penalty | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        require_instance("SGD objective", self.objective, Objective)
        require_instance("SGD averaging", self.averaging, IterateAverage, optional=True)
        require_rate("SGD rate", self.rate)
        require_in("SGD momentum", self.momentum, "[0, 1)")
        require_flag("SGD nesterov", self.nesterov)
        require_positive("SGD l2", self.l2, zero=True)
        require_instance("SGD penalty", self.penalty, Penalty, optional=True)
        require_integer("SGD seed", self.seed, zero=True)

    def init(self, params: Tree) -> SGDState:
        check_params(params, self.penalty)
        return SGDState(params, params if self.averaging else None, 0, trees.zeros_like(params))

    def step(
        self, state: SGDState, x: Array, t: Array, weights: Array | None = None
    ) -> tuple[SGDState, StepReport]:
        self.check_state(state)
        k = state.step + 1
        noise = Rng(self.seed).child("forward", k)
        checks = DeferredChecks()
        e = self.objective.evaluate(state.params, x, t, weights, noise, checks)
        h = Regularized.of(e, penalized(self.l2, self.penalty))
        h.require_finite(k, checks)
        rate = value_at(self.rate, k)
        velocity = trees.combine(self.momentum, state.velocity, -rate, h.gradient)
        update = velocity
        if self.nesterov:
            update = trees.combine(self.momentum, velocity, -rate, h.gradient)
        params, norm = apply_update(state.params, update, k, checks)
        average = self.averaging.update(state.average, params, k) if self.averaging else None
        numbers: dict[str, Scalar | float | None] = {
            **h.numbers,
            "update_norm": norm,
            "alpha": rate,
            "mu": self.momentum,
        }
        report = StepReport(k, x.shape[0], numbers)
        return keep_good(state, SGDState(params, average, k, velocity), checks), report
