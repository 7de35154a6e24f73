"""From a proposal to an update: how far to go, and how much of the previous update to keep."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

from kfac_np import trees
from kfac_np.backend import Array, Doubts, Scalar, array_namespace, isfinite, scalar, select, sqrt
from kfac_np.errors import ConfigError, DivergenceError
from kfac_np.objective import Evaluation
from kfac_np.optimizers.schedules import (
    Schedule,
    require_number,
    require_positive,
    require_rate,
    value_at,
)
from kfac_np.products import tangent_forms
from kfac_np.trees import Tree

__all__ = ["Choice", "FixedRate", "LocalModel", "QuadraticModel", "StepRule"]


@final
@dataclass(frozen=True, eq=False)
class LocalModel:
    """M(δ) = ½ δᵀ (F + damping · I) δ + ∇hᵀ δ + h, with the exact Fisher F.

    Attributes
    ----------
    evaluation : Evaluation
        The examples that F is formed on.
    gradient : tree of Array
        ∇h.
    damping : float
        λ + η.
    room : float
        h less the least value that it can have.
    previous : tree or None
        δ₀, the update of the step before.

    References
    ----------
    Martens & Grosse 2015, §6.4 and §7; appendix C for F without backward passes.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> from kfac_np.objective import Objective
    >>> e = Objective(Dense(1, 1, bias=False), SquaredError()).evaluate(
    ...     np.asarray([[2.0]]), np.ones((1, 1)), np.zeros((1, 1)))
    >>> LocalModel(e, e.gradient(), damping=1.0).decrease(np.asarray([[-1.0]]))
    -1.0
    """

    evaluation: Evaluation
    gradient: Tree
    damping: Scalar
    room: Scalar = math.inf
    previous: Tree | None = None

    def bend_and_slope(self, vectors: Sequence[Tree]) -> tuple[list[list[Scalar]], list[Scalar]]:
        """Matrix of v_iᵀ (F + damping · I) v_j, and vector of ∇hᵀ v_i."""
        tangents = [
            self._previous_tangent if v is self.previous else self.evaluation.jvp(v)
            for v in vectors
        ]
        fisher, m = tangent_forms(self.evaluation, tangents), len(vectors)
        bend: list[list[Scalar]] = [[0.0] * m for _ in vectors]
        for i, u in enumerate(vectors):
            for j in range(i, m):
                inner = scalar(trees.inner(u, vectors[j]))
                bend[i][j] = bend[j][i] = scalar(fisher[i, j]) + self.damping * inner
        return bend, [scalar(trees.inner(v, self.gradient)) for v in vectors]

    @cached_property
    def _previous_tangent(self) -> Array:
        """J δ₀, which goes with every proposal."""
        return self.evaluation.jvp(self.previous)

    def decrease(self, update: Tree) -> Scalar:
        """M(δ) - M(0) for one update."""
        bend, slope = self.bend_and_slope([update])
        return 0.5 * bend[0][0] + slope[0]


@final
@dataclass(frozen=True)
class Choice:
    """The coefficients of δ = αΔ + μδ₀.

    Attributes
    ----------
    alpha, mu : Scalar
    decrease : Scalar or None
        M(δ) - M(0), where the rule evaluated it; infinite if there is no finite choice.

    Examples
    --------
    >>> Choice(1.0, 0.0, None).alpha
    1.0
    """

    alpha: Scalar
    mu: Scalar
    decrease: Scalar | None


def require_finite_choice(choice: Choice, k: int, doubts: Doubts) -> None:
    """It is a `DivergenceError` if the model was not finite along the proposal.

    Examples
    --------
    >>> require_finite_choice(Choice(0.0, 0.0, math.inf), 7, Doubts())
    Traceback (most recent call last):
    kfac_np.errors.DivergenceError: step 7: the quadratic model is not finite along the ...
    """
    decrease = choice.decrease
    if decrease is not None:
        doubts.require(
            isfinite(decrease),
            lambda: DivergenceError(
                f"step {k}: the quadratic model is not finite along the proposed update; the "
                "parameters are unchanged. Use more damping, or scale the data"
            ),
        )


class StepRule(ABC):
    """Chooses the coefficients α and μ for a proposal Δ.

    Examples
    --------
    >>> FixedRate(0.1).compares, QuadraticModel().compares
    (False, True)
    """

    @property
    @abstractmethod
    def compares(self) -> bool:
        """Tell whether choices for several proposals can be compared by their `decrease`."""

    @property
    @abstractmethod
    def fraction(self) -> float:
        """τ₂, the fraction of the mini-batch that the exact Fisher of the model uses."""

    @abstractmethod
    def choose(
        self,
        k: int,
        model: LocalModel,
        proposal: Tree,
        curvature_norm: Callable[[Tree], Scalar],
    ) -> Choice:
        """Choose.

        Parameters
        ----------
        k : int
            Number of the step, from 1.
        model : LocalModel
            Its `previous` is δ₀.
        proposal : tree
            Δ, which points downhill.
        curvature_norm : callable
            v ↦ vᵀ F̂ v with the approximate curvature, undamped.
        """


@final
@dataclass(frozen=True)
class QuadraticModel(StepRule):
    """(α, μ) minimise the quadratic model with the exact Fisher.

    Solves the 2×2 system [Δᵀ B Δ, Δᵀ B δ₀; ·, δ₀ᵀ B δ₀] (α, μ)ᵀ = -(∇hᵀΔ, ∇hᵀδ₀) with
    B = F + (λ + η) I. Where Δ and δ₀ are parallel to rounding error, μ = 0.

    Once a network fits its training data F vanishes, and the model promises more than there is:
    a loss below zero. With `bounded` the update is shortened until the model promises no more than
    to reach the loss's lower bound. Without it such steps, and adaptive λ that follows them down,
    can throw the parameters far off.

    Parameters
    ----------
    fraction : float
        τ₂.
    bounded : bool
        The paper has no such bound.
    momentum : bool
        Without it μ = 0, and α alone minimises the model (§6.4).

    References
    ----------
    Martens & Grosse 2015, §6.4 and §7.

    Examples
    --------
    >>> QuadraticModel().fraction
    0.25
    """

    fraction: float = 1 / 4
    bounded: bool = True
    momentum: bool = True

    def __post_init__(self) -> None:
        require_fraction("QuadraticModel fraction", self.fraction)

    @property
    def compares(self) -> bool:
        return True

    def choose(
        self,
        k: int,
        model: LocalModel,
        proposal: Tree,
        curvature_norm: Callable[[Tree], Scalar],
    ) -> Choice:
        previous = model.previous if self.momentum else None
        bend, slope = model.bend_and_slope([proposal] if previous is None else [proposal, previous])
        xp = array_namespace(model.evaluation.outputs)
        rounding = 10.0 * float(xp.finfo(model.evaluation.outputs.dtype).eps)
        other = None if previous is None else (bend[1][1], bend[0][1], slope[1])
        alpha, mu = _minimise(bend[0][0], slope[0], other, rounding)
        kept = 0.0 if previous is None else select(mu != 0.0, mu * slope[1], 0.0)
        fine = isfinite(bend[0][0] + slope[0])
        decrease = select(fine, 0.5 * (alpha * slope[0] + kept), math.inf)
        choice = Choice(alpha, mu, decrease)
        return self._within(model.room, choice) if self.bounded else choice

    def _within(self, room: Scalar, choice: Choice) -> Choice:
        """Shorten an update until its predicted decrease is `room` at most."""
        assert choice.decrease is not None
        room = select(room > 0.0, room, 0.0)
        promised = -choice.decrease
        too_much = promised > room
        # δ minimises the model along its own ray: M(sδ) - M(0) = (2s - s²) (M(δ) - M(0)).
        part = select(too_much, room, 0.0) / select(too_much, promised, 1.0)
        s = select(too_much, 1.0 - sqrt(1.0 - part), 1.0)
        decrease = select(too_much, -room, choice.decrease)
        return Choice(s * choice.alpha, s * choice.mu, decrease)


def _minimise(
    bend: Scalar, slope: Scalar, other: tuple[Scalar, Scalar, Scalar] | None, rounding: float
) -> tuple[Scalar, Scalar]:
    """Minimise ½ xᵀBx + cᵀx in one variable, or two (other = B₂₂, B₁₂, c₂)."""
    bends = bend > 0.0
    alone = select(bends, -slope / select(bends, bend, 1.0), 0.0)
    if other is None:
        return alone, 0.0
    bend2, cross, slope2 = other
    determinant = bend * bend2 - cross * cross
    regular = determinant > rounding * bend * bend2
    divisor = select(regular, determinant, 1.0)
    return (
        select(regular, (cross * slope2 - bend2 * slope) / divisor, alone),
        select(regular, (cross * slope - bend * slope2) / divisor, 0.0),
    )


@final
@dataclass(frozen=True)
class FixedRate(StepRule):
    """δ = α ν Δ + μ δ₀ with given α and μ, for highly stochastic training.

    The KL clip ν = min(1, √(κ / (α² Δᵀ F̂ Δ))) bounds the predicted change of the model's
    distribution; F̂ is the undamped approximate curvature.

    Parameters
    ----------
    rate : float or Schedule
        α.
    momentum : float or Schedule
        μ.
    kl_clip : float, optional
        κ; no clipping without it.

    References
    ----------
    Ba, Grosse & Martens 2017, §5; Grosse & Martens 2016, §6.

    Examples
    --------
    >>> FixedRate(rate=0.1, momentum=0.9, kl_clip=1e-3).kl_clip
    0.001
    """

    rate: float | Schedule = 0.1
    momentum: float | Schedule = 0.9
    kl_clip: float | None = None
    fraction: float = 1.0

    def __post_init__(self) -> None:
        require_rate("FixedRate rate", self.rate)
        if not isinstance(self.momentum, Schedule):
            require_number("FixedRate momentum", self.momentum)
        if not isinstance(self.momentum, Schedule) and not 0.0 <= self.momentum < 1.0:
            raise ConfigError(f"FixedRate momentum: expected [0, 1), got {self.momentum!r}")
        if self.kl_clip is not None:
            require_positive("FixedRate kl_clip", self.kl_clip)
        require_fraction("FixedRate fraction", self.fraction)

    @property
    def compares(self) -> bool:
        return False

    def choose(
        self,
        k: int,
        model: LocalModel,
        proposal: Tree,
        curvature_norm: Callable[[Tree], Scalar],
    ) -> Choice:
        rate: Scalar = value_at(self.rate, k)
        if self.kl_clip is not None:
            change = rate**2 * curvature_norm(proposal)
            clipped = change > self.kl_clip
            rate = rate * select(clipped, sqrt(self.kl_clip / select(clipped, change, 1.0)), 1.0)
        return Choice(rate, value_at(self.momentum, k), None)


def require_fraction(name: str, value: float) -> None:
    """Raise `ConfigError` unless 0 < value <= 1.

    Examples
    --------
    >>> require_fraction("fraction", 2.0)
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: fraction: expected a number in (0, 1], got 2.0
    """
    require_positive(name, value)
    if value > 1.0:
        raise ConfigError(f"{name}: expected a number in (0, 1], got {value!r}")
