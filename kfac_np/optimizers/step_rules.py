"""From proposals to an update: how far to go, and how much of the previous update to keep."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from kfac_np import trees
from kfac_np.backend import array_namespace, to_numpy
from kfac_np.errors import ConfigError, DivergenceError
from kfac_np.objective import Evaluation
from kfac_np.optimizers.schedules import (
    Schedule,
    require_number,
    require_positive,
    require_rate,
    value_at,
)
from kfac_np.products import quadratic_forms
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
    damping: float
    room: float = math.inf

    def bend_and_slope(self, vectors: Sequence[Tree]) -> tuple[list[list[float]], list[float]]:
        """Matrix of v_iᵀ (F + damping · I) v_j, and vector of ∇hᵀ v_i."""
        xp = array_namespace(self.evaluation.outputs)
        fisher = quadratic_forms(self.evaluation, vectors)
        # Inner products among the vectors and with the gradient, in one transfer to the host.
        pairs = [[trees.inner(u, v) for v in (*vectors, self.gradient)] for u in vectors]
        numbers = to_numpy(
            xp.concat([fisher, xp.stack([xp.stack(row) for row in pairs])], axis=1)
        ).tolist()
        m = len(vectors)
        bend = [[row[j] + self.damping * row[m + j] for j in range(m)] for row in numbers]
        return bend, [row[2 * m] for row in numbers]

    def decrease(self, update: Tree) -> float:
        """M(δ) - M(0) for one update."""
        bend, slope = self.bend_and_slope([update])
        return 0.5 * bend[0][0] + slope[0]


@final
@dataclass(frozen=True)
class Choice:
    """Which proposal is taken, and the coefficients of δ = αΔ + μδ₀.

    Attributes
    ----------
    index : int
    alpha, mu : float
    decrease : float or None
        M(δ) - M(0), where the rule evaluated it.

    Examples
    --------
    >>> Choice(0, 1.0, 0.0, None).alpha
    1.0
    """

    index: int
    alpha: float
    mu: float
    decrease: float | None


class StepRule(ABC):
    """Chooses among proposals Δ, and the coefficients α and μ.

    Examples
    --------
    >>> FixedRate(0.1).compares, QuadraticModel().compares
    (False, True)
    """

    @property
    @abstractmethod
    def compares(self) -> bool:
        """Tell whether the rule can choose among several proposals."""

    @property
    @abstractmethod
    def fraction(self) -> float:
        """τ₂, the fraction of the mini-batch that the exact Fisher of the model uses."""

    @abstractmethod
    def choose(
        self,
        k: int,
        model: LocalModel,
        proposals: Sequence[Tree],
        previous: Tree | None,
        curvature_norm: Callable[[Tree], float],
    ) -> Choice:
        """Choose.

        Parameters
        ----------
        k : int
            Number of the step, from 1.
        model : LocalModel
        proposals : sequence of trees
            Candidates for Δ, which points downhill.
        previous : tree or None
            δ₀, the previous update.
        curvature_norm : callable
            v ↦ vᵀ F̂ v with the approximate curvature, undamped.

        Raises
        ------
        DivergenceError
            There is no finite choice.
        """


@final
@dataclass(frozen=True)
class QuadraticModel(StepRule):
    """(α, μ) minimise the quadratic model with the exact Fisher; of several proposals the best.

    Solves the 2×2 system [Δᵀ B Δ, Δᵀ B δ₀; ·, δ₀ᵀ B δ₀] (α, μ)ᵀ = -(∇hᵀΔ, ∇hᵀδ₀) with
    B = F + (λ + η) I. Where Δ and δ₀ are parallel to rounding error, μ = 0. A proposal along which
    the model overflows is left out; if there is no other, that is a `DivergenceError`.

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
        proposals: Sequence[Tree],
        previous: Tree | None,
        curvature_norm: Callable[[Tree], float],
    ) -> Choice:
        previous = previous if self.momentum else None
        vectors = [*proposals] if previous is None else [*proposals, previous]
        bend, slope = model.bend_and_slope(vectors)
        xp = array_namespace(model.evaluation.outputs)
        rounding = 10.0 * float(xp.finfo(model.evaluation.outputs.dtype).eps)
        last = len(vectors) - 1
        best: Choice | None = None
        for i in range(len(proposals)):
            if not (math.isfinite(bend[i][i]) and math.isfinite(slope[i])):
                continue
            alpha, mu = _minimise(bend[i][i], slope[i], None, rounding)
            if previous is not None:
                other = (bend[last][last], bend[i][last], slope[last])
                alpha, mu = _minimise(bend[i][i], slope[i], other, rounding)
            decrease = 0.5 * (alpha * slope[i] + (mu * slope[last] if mu else 0.0))
            if best is None or best.decrease is None or decrease < best.decrease:
                best = Choice(i, alpha, mu, decrease)
        if best is None:
            raise DivergenceError(
                f"step {k}: the quadratic model is not finite along the proposed update; the "
                "parameters are unchanged. Use more damping, or scale the data"
            )
        return self._within(model.room, best) if self.bounded else best

    def _within(self, room: float, choice: Choice) -> Choice:
        """Shorten an update until its predicted decrease is `room` at most."""
        assert choice.decrease is not None
        if -choice.decrease <= room:
            return choice
        # δ minimises the model along its own ray: M(sδ) - M(0) = (2s - s²) (M(δ) - M(0)).
        s = 1.0 - math.sqrt(1.0 - max(room, 0.0) / -choice.decrease)
        return Choice(choice.index, s * choice.alpha, s * choice.mu, -max(room, 0.0))


def _minimise(
    bend: float, slope: float, other: tuple[float, float, float] | None, rounding: float
) -> tuple[float, float]:
    """Minimise ½ xᵀBx + cᵀx in one variable, or two (other = B₂₂, B₁₂, c₂)."""
    alone = (-slope / bend if bend > 0.0 else 0.0), 0.0
    if other is None:
        return alone
    bend2, cross, slope2 = other
    determinant = bend * bend2 - cross * cross
    if not determinant > rounding * bend * bend2:
        return alone
    return (
        (cross * slope2 - bend2 * slope) / determinant,
        (cross * slope - bend * slope2) / determinant,
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
        proposals: Sequence[Tree],
        previous: Tree | None,
        curvature_norm: Callable[[Tree], float],
    ) -> Choice:
        rate = value_at(self.rate, k)
        if self.kl_clip is not None:
            change = rate**2 * curvature_norm(proposals[0])
            if change > self.kl_clip:
                rate *= math.sqrt(self.kl_clip / change)
        return Choice(0, rate, value_at(self.momentum, k), None)


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
