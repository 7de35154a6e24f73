"""Adam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from kfac_np import trees
from kfac_np.backend import Array, DeferredChecks, Rng, Scalar, array_namespace
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
    require_in,
    require_instance,
    require_integer,
    require_positive,
)

__all__ = ["Adam", "AdamState"]


@final
@dataclass(frozen=True, eq=False)
class AdamState(State):
    """State of `Adam`: besides the parameters two moving averages.

    Examples
    --------
    >>> AdamState(params=(), average=None, step=0, first=(), second=()).step
    0
    """

    like_params: ClassVar[tuple[str, ...]] = ("params", "average", "first", "second")

    first: Tree
    second: Tree


@final
@dataclass(frozen=True)
class Adam(Optimizer):
    """θ ← θ - α m̂ / (√v̂ + ε), m̂ and v̂ unbiased moving averages of ∇h and its square.

    Parameters
    ----------
    objective : Objective
    rate : float or Schedule
        α.
    beta1, beta2 : float
        Decay of the two averages, in [0, 1).
    epsilon : float
    l2 : float
        η: h = loss + (η/2)‖θ‖² (inside the gradient, as in the paper, not decoupled).
    averaging : IterateAverage, optional
    seed : int
        Of what layers draw in training (Dropout).
    penalty : Penalty, optional
        R: h = loss + (η/2)‖θ‖² + R(θ), of `kfac_np.penalties`.

    References
    ----------
    Kingma & Ba 2015, arXiv:1412.6980, algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> adam = Adam(Objective(Dense(1, 1, bias=False), SquaredError()), rate=0.1)
    >>> state, _ = adam.step(adam.init(np.asarray([[1.0]])), np.ones((1, 1)), np.zeros((1, 1)))
    >>> state.params.round(6)
    array([[0.9]])
    """

    state_type: ClassVar[type[State]] = AdamState

    rate: float | Schedule = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    l2: float = 0.0
    averaging: IterateAverage | None = None
    seed: int = 0
    penalty: Penalty | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        require_instance("Adam objective", self.objective, Objective)
        require_instance("Adam averaging", self.averaging, IterateAverage, optional=True)
        require_rate("Adam rate", self.rate)
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            require_in(f"Adam {name}", beta, "[0, 1)")
        require_positive("Adam epsilon", self.epsilon)
        require_positive("Adam l2", self.l2, zero=True)
        require_instance("Adam penalty", self.penalty, Penalty, optional=True)
        require_integer("Adam seed", self.seed, zero=True)

    def init(self, params: Tree) -> AdamState:
        check_params(params, self.penalty)
        zeros = trees.zeros_like(params)
        return AdamState(params, params if self.averaging else None, 0, zeros, zeros)

    def step(
        self, state: AdamState, x: Array, t: Array, weights: Array | None = None
    ) -> tuple[AdamState, StepReport]:
        self.check_state(state)
        k = state.step + 1
        noise = Rng(self.seed).child("forward", k)
        checks = DeferredChecks()
        e = self.objective.evaluate(state.params, x, t, weights, noise, checks)
        h = Regularized.of(e, penalized(self.l2, self.penalty))
        h.require_finite(k, checks)
        rate = value_at(self.rate, k)
        b1, b2 = self.beta1, self.beta2
        first = trees.combine(b1, state.first, 1.0 - b1, h.gradient)
        second = trees.tree_map(lambda v, g: b2 * v + (1.0 - b2) * g * g, state.second, h.gradient)
        debias1, debias2 = 1.0 - b1**k, 1.0 - b2**k

        def leaf(m: Array, v: Array) -> Array:
            root = array_namespace(v).sqrt(v * (1.0 / debias2))
            return (-rate / debias1) * m / (root + self.epsilon)

        params, norm = apply_update(state.params, trees.tree_map(leaf, first, second), k, checks)
        average = self.averaging.update(state.average, params, k) if self.averaging else None
        numbers: dict[str, Scalar | float | None] = {
            **h.numbers,
            "update_norm": norm,
            "alpha": rate,
        }
        report = StepReport(k, x.shape[0], numbers)
        return keep_good(state, AdamState(params, average, k, first, second), checks), report
