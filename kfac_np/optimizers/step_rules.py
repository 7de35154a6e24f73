"""From a proposal to an update: how far to go, and how much of the previous update to keep."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from kfac_np.backend import DeferredChecks, Scalar, array_namespace, isfinite, select, sqrt
from kfac_np.errors import ConfigError, DivergenceError
from kfac_np.optimizers.balance import Balance
from kfac_np.optimizers.local_model import LocalModel
from kfac_np.optimizers.schedules import (
    Schedule,
    require_flag,
    require_integer,
    require_number,
    require_positive,
    require_rate,
    value_at,
)
from kfac_np.trees import Tree
from kfac_np.validation import plain_fields
from kfac_np.validation import require_fraction as require_fraction

__all__ = ["Choice", "FixedRate", "QuadraticModel", "StepRule"]


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


def require_finite_choice(choice: Choice, k: int, checks: DeferredChecks) -> None:
    """It is a `DivergenceError` if the model was not finite along the proposal.

    Examples
    --------
    >>> require_finite_choice(Choice(0.0, 0.0, math.inf), 7, DeferredChecks())
    Traceback (most recent call last):
    kfac_np.errors.DivergenceError: step 7: the quadratic model is not finite along the ...
    """
    decrease = choice.decrease
    if decrease is not None:
        checks.require(
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

    @property
    def least_examples(self) -> int:
        """How many examples it uses at least, where the mini-batch has so many."""
        return 1

    @property
    def balance(self) -> Balance | None:
        """How the layers' proposals are balanced before the rule sees them, if they are."""
        return None

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
    least_examples : int
        A quarter of a small batch tells too little of F: it is 0 along more directions, and the
        steps are too long. So it is so many examples at least, or all. The paper's batches have
        thousands, and no such number (1).
    bounded : bool
        The paper has no such bound.
    momentum : bool
        Without it μ = 0, and α alone minimises the model (§6.4).
    balance : Balance or None
        Multipliers of the layers' proposals; none by default, as in the paper.

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
    balance: Balance | None = None
    least_examples: int = 256

    def __post_init__(self) -> None:
        plain_fields(self)
        require_fraction("QuadraticModel fraction", self.fraction)
        require_integer("QuadraticModel least_examples", self.least_examples)
        require_flag("QuadraticModel bounded", self.bounded)
        require_flag("QuadraticModel momentum", self.momentum)
        if not isinstance(self.balance, Balance | None):
            raise ConfigError(
                f"QuadraticModel balance: expected a Balance or None, got {self.balance!r}"
            )

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
        bend, slope = model.forms_and_slope(
            [proposal] if previous is None else [proposal, previous]
        )
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
        plain_fields(self)
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
