"""How λ (of the quadratic model) and γ (of the factors) come about and change."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

from kfac_np.backend import Scalar, both, select
from kfac_np.errors import ConfigError
from kfac_np.optimizers.schedules import (
    Schedule,
    require_flag,
    require_integer,
    require_number,
    require_positive,
    require_rate,
    value_at,
)
from kfac_np.validation import plain_fields

__all__ = [
    "ConstantDamping",
    "CoupledGamma",
    "DampingPolicy",
    "GammaPolicy",
    "GammaSearch",
    "LevenbergMarquardt",
]


_MOST = 1e30  # that λ grows to where updates are taken back: no update is left of it
_NO_FLOOR = 1e-10  # of a typical eigenvalue: far below, the damping of singular factors is rounding


class DampingPolicy(ABC):
    """Chooses λ, the multiple of the identity in the quadratic model.

    On an asynchronous device, numbers are 0-d arrays (`Scalar`). A policy that
    decides by `if` is right there, too, but makes the step wait.

    Examples
    --------
    >>> policy = LevenbergMarquardt(initial=1.0)
    >>> policy.measures(4), policy.measures(5)
    (False, True)
    """

    adapts: ClassVar[bool] = True
    """Whether λ is carried over; one that is given anew in every step is multiplied, for a while,
    where updates were taken back."""

    @abstractmethod
    def at(self, k: int, current: Scalar | None) -> Scalar:
        """λ for step k, given the one carried over (in the first step, that of `start`)."""

    def start(self, eigenvalue: Callable[[], Scalar]) -> Scalar | None:
        """λ to begin with; None where F̂ does not decide it.

        `eigenvalue` gives a typical eigenvalue of the first step's F̂, 0 where F̂ is 0.
        """
        return None

    @abstractmethod
    def measures(self, k: int) -> bool:
        """Tell whether step k measures the reduction ratio ρ."""

    @abstractmethod
    def update(
        self, current: Scalar, rho: Scalar, eigenvalue: Callable[[], Scalar], *, noisy: bool = True
    ) -> Scalar:
        """λ after a measurement of ρ, the change of h over what the model predicted.

        ρ is NaN where the model predicts a change that is lost in the rounding of h: it says
        nothing, then. `eigenvalue` as in `start`, of this step's F̂. `noisy` tells whether batches
        differ, so that the batch of the step does not speak for the others.
        """

    def rejected(self, current: Scalar, times: int) -> Scalar:
        """λ after an update was taken back, the last of so many in a row: 4^times as much."""
        raised = current * 4.0 ** min(times, 8)
        return select(raised < _MOST, raised, _MOST)


@final
@dataclass(frozen=True)
class ConstantDamping(DampingPolicy):
    """λ fixed, or by a schedule.

    Examples
    --------
    >>> ConstantDamping(0.1).at(7, None)
    0.1
    """

    adapts: ClassVar[bool] = False

    value: float | Schedule = 1e-3

    def __post_init__(self) -> None:
        plain_fields(self)
        require_rate("ConstantDamping value", self.value, zero=True)

    def at(self, k: int, current: Scalar | None) -> Scalar:
        return value_at(self.value, k)

    def measures(self, k: int) -> bool:
        return False

    def update(
        self, current: Scalar, rho: Scalar, eigenvalue: Callable[[], Scalar], *, noisy: bool = True
    ) -> Scalar:
        return current


@final
@dataclass(frozen=True)
class LevenbergMarquardt(DampingPolicy):
    """λ by the Levenberg-Marquardt rule, every `interval` steps.

    ρ = (h(θ + δ) - h(θ)) / (M(δ) - M(0)); ρ > 3/4: λ ← ω₁ λ; ρ < 1/4: λ ← λ / ω₁, with
    ω₁ = decay^interval. Then λ is kept within bounds that are multiples of a typical eigenvalue of
    F̂ at that step. Where ρ says nothing, since what the model predicts is lost in the rounding of
    h, λ comes down to that eigenvalue.

    ρ is measured on the mini-batch that the step was fitted to, and says nothing about the other
    examples. Where a step can fit the noise of its batch, ρ is near 1 however small λ is, and λ
    would fall without end. The floor keeps that in bounds; where all batches are the same one, the
    whole data set, there is no such noise, and no floor.

    Parameters
    ----------
    initial : float, optional
        λ₀. Without it a typical eigenvalue of F̂ at the first step: the geometric mean over the
        layers' parameters of tr F̂_i / n_i, the mean eigenvalue of layer i with n_i parameters.
        It needs no tuning: multiplying the loss by a number, which multiplies F, multiplies λ₀,
        and a loss that sums over many outputs has a large one. The published value is 150, for
        autoencoders of images; it is thousands of times as much, and most of the first hundred
        steps go into coming down from there. (A plain mean is that of the layers with the
        largest F̂; where gradients vanish on their way down it is far too much for the others. To
        try several λ in the first step and take what reduces the loss most is no better guide:
        what is best for one step from random parameters is far too much for the next fifty.)
        Layers whose F̂_i is 0 do not count; λ₀ is at least a thousandth of tr F̂ / n, and 1 where
        F̂ is 0. A curvature that has no blocks (`FullMatrix`, `FullKronecker`) gives tr F̂ / n.
        Give a number when training starts from a network that is already sure of its answers:
        targets sampled from it hardly ever say how much F̂ still is, and λ₀ is then off by
        powers of ten from draw to draw.
    decay : float
        ω₁ for one step, in (0, 1).
    interval : int
        T₁.
    minimum, maximum : float
        λ is kept between them, whatever the floor.
    floor : float
        λ / typical eigenvalue is not adapted to less while batches differ. The paper has no floor
        (0).
    ceiling : float
        λ / typical eigenvalue is not adapted to more. The paper has none (infinite).

    References
    ----------
    Martens & Grosse 2015, §6.5.

    Examples
    --------
    >>> policy = LevenbergMarquardt(initial=1.0, decay=0.5, interval=1)
    >>> [policy.update(1.0, rho, lambda: 0.1) for rho in (0.9, 0.5, 0.1)]
    [0.5, 1.0, 2.0]
    >>> policy.rejected(1.0, 2)
    16.0
    >>> policy.update(1.0, 0.9, lambda: 3.0)
    0.9
    >>> LevenbergMarquardt().start(lambda: 0.02)
    0.02
    """

    initial: float | None = None
    decay: float = 0.5 ** (1 / 5)
    interval: int = 5
    minimum: float = 0.0
    maximum: float = math.inf
    floor: float = 0.3
    ceiling: float = 1e8

    def __post_init__(self) -> None:
        plain_fields(self)
        if self.initial is not None:
            require_positive("LevenbergMarquardt initial", self.initial)
        require_positive("LevenbergMarquardt floor", self.floor, zero=True)
        require_number("LevenbergMarquardt ceiling", self.ceiling)
        if not self.ceiling >= max(1.0, self.floor):
            raise ConfigError(
                "LevenbergMarquardt ceiling: expected at least 1 and at least the floor, got "
                f"{self.ceiling!r}"
            )
        require_integer("LevenbergMarquardt interval", self.interval)
        for name in ("decay", "minimum", "maximum"):
            require_number(f"LevenbergMarquardt {name}", getattr(self, name))
        if not 0.0 < self.decay < 1.0:
            raise ConfigError(f"LevenbergMarquardt decay: expected (0, 1), got {self.decay!r}")
        initial = self.minimum if self.initial is None else self.initial
        if not 0.0 <= self.minimum <= initial <= self.maximum or math.isinf(self.minimum):
            raise ConfigError(
                "LevenbergMarquardt: expected 0 <= minimum <= initial <= maximum, got "
                f"{self.minimum!r}, {self.initial!r}, {self.maximum!r}"
            )

    def start(self, eigenvalue: Callable[[], Scalar]) -> Scalar | None:
        if self.initial is not None:
            return self.initial
        found = eigenvalue()
        return self._within(select(found > 0.0, found, 1.0))

    def at(self, k: int, current: Scalar | None) -> Scalar:
        if current is None:
            raise ConfigError("LevenbergMarquardt: expected a λ carried over, or `start` before")
        return current

    def measures(self, k: int) -> bool:
        return k % self.interval == 0

    def update(
        self, current: Scalar, rho: Scalar, eigenvalue: Callable[[], Scalar], *, noisy: bool = True
    ) -> Scalar:
        omega = self.decay**self.interval
        new = select(rho > 0.75, omega * current, select(rho < 0.25, current / omega, current))
        if self.floor == 0.0 and math.isinf(self.ceiling):
            return self._within(new)
        typical = eigenvalue()
        telling = rho == rho
        lower = select(omega * current > typical, omega * current, typical)
        new = select(telling, new, select(current > typical, lower, current))
        least = (self.floor if noisy else _NO_FLOOR) * typical
        new = select(new > least, new, least)
        most = self.ceiling * typical
        most = select(most > omega * current, most, omega * current)  # down, but step by step
        return self._within(select(both(new > most, typical > 0.0), most, new))

    def _within(self, current: Scalar) -> Scalar:
        current = select(current > self.minimum, current, self.minimum)
        return select(current < self.maximum, current, self.maximum)


class GammaPolicy(ABC):
    """Chooses γ: the factors approximate F + γ² I.

    Examples
    --------
    >>> GammaSearch().searches(20), GammaSearch().searches(21)
    (True, False)
    """

    thorough: bool = True
    follows: bool = False

    @abstractmethod
    def candidates(self, k: int, current: float | None, damping: float) -> tuple[float, ...]:
        """Values of γ to try at step k, one after the other; that with the least M(δ) is kept.

        With `thorough` all are tried, without it none after the first that is better than the
        first of all. `current` is None before the first step; `damping` is λ + η. Where the policy
        `follows`, the current γ has been multiplied as √(λ + η) was since it was chosen.
        """

    @abstractmethod
    def searches(self, k: int) -> bool:
        """Tell whether step k tries several values."""


@final
@dataclass(frozen=True)
class CoupledGamma(GammaPolicy):
    """γ = √(λ + η) always.

    Examples
    --------
    >>> CoupledGamma().candidates(1, None, 4.0)
    (2.0,)
    """

    def candidates(self, k: int, current: float | None, damping: float) -> tuple[float, ...]:
        return (math.sqrt(damping),)

    def searches(self, k: int) -> bool:
        return False


@final
@dataclass(frozen=True)
class GammaSearch(GammaPolicy):
    """γ₀ = ratio · √(λ₀ + η); now and then the best of {γ, ω₂ γ, γ / ω₂}, ω₂ = decay^interval.

    Needs a step rule that evaluates the quadratic model.

    Parameters
    ----------
    interval : int
        T₂: searched in every step that it divides.
    decay : float
        ω₂ for one step, in (0, 1); the published value is √(19/20).
    minimum, maximum : float
        The smaller candidate is at least `minimum`, the larger one at most `maximum`; γ itself
        stays a candidate. The paper states no bounds; without an upper one the search can drift
        away for good, since far above the factors' eigenvalues F̂ ∝ I and every candidate is as
        good as any other. The companion code of the paper uses 1 (and √η below).
    early : tuple of int
        Further steps in which γ is searched: the first value is a guess, and likely a low one, so
        that the larger candidate is tried before the smaller one.
    ratio : float
        γ₀ / √(λ₀ + η). The paper has 1.
    follows : bool
        γ follows √(λ + η) between searches. In the paper only a search changes it.
    within : float
        Bounds that have no scale of their own: the smaller candidate is at least
        √(λ + η) / within, the larger one at most √(λ + η) · within.
    thorough : bool
        As the paper has it, all three are tried, each with factors of its own. Without it the
        third is tried only where the second is no better than γ: less work, and the same choice
        where M has one minimum in γ and γ is within the bounds.

    References
    ----------
    Martens & Grosse 2015, §6.6.

    Examples
    --------
    >>> [round(g, 3) for g in GammaSearch(interval=2, decay=0.5).candidates(2, 1.0, 0.0)]
    [1.0, 0.25, 4.0]
    """

    interval: int = 20
    decay: float = math.sqrt(19 / 20)
    minimum: float = 0.0
    maximum: float = math.inf
    early: tuple[int, ...] = ()
    ratio: float = 1.0
    within: float = math.inf
    thorough: bool = True
    follows: bool = False

    def __post_init__(self) -> None:
        plain_fields(self)
        require_integer("GammaSearch interval", self.interval)
        for name in ("decay", "minimum", "maximum"):
            require_number(f"GammaSearch {name}", getattr(self, name))
        if not 0.0 <= self.minimum <= self.maximum or math.isinf(self.minimum):
            raise ConfigError(
                f"GammaSearch: expected 0 <= minimum <= maximum, got {self.minimum!r} and "
                f"{self.maximum!r}"
            )
        if not 0.0 < self.decay < 1.0:
            raise ConfigError(f"GammaSearch decay: expected (0, 1), got {self.decay!r}")
        if not isinstance(self.early, tuple):
            raise ConfigError(f"GammaSearch early: expected a tuple of steps, got {self.early!r}")
        for k in self.early:
            require_integer("GammaSearch early", k)
        require_positive("GammaSearch ratio", self.ratio)
        require_flag("GammaSearch thorough", self.thorough)
        require_flag("GammaSearch follows", self.follows)
        require_number("GammaSearch within", self.within)
        if not self.within >= 1.0:
            raise ConfigError(f"GammaSearch within: expected >= 1, got {self.within!r}")

    def candidates(self, k: int, current: float | None, damping: float) -> tuple[float, ...]:
        root = math.sqrt(damping)
        gamma = self.ratio * root if current is None else current
        if not self.searches(k):
            return (gamma,)
        omega = self.decay**self.interval
        # γ itself stays a candidate even where the bounds exclude it, as at a large λ₀
        lowest = max(self.minimum, root / self.within)
        highest = min(self.maximum, root * self.within) if root else self.maximum
        smaller, larger = max(omega * gamma, lowest), min(gamma / omega, highest)
        others = (larger, smaller) if k in self.early else (smaller, larger)
        return tuple(dict.fromkeys((gamma, *others)))

    def searches(self, k: int) -> bool:
        return k % self.interval == 0 or k in self.early
