"""λ, the damping of the quadratic model: how it comes about and changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

from kfac_np.backend import Scalar, select
from kfac_np.errors import ConfigError
from kfac_np.optimizers.schedules import Schedule, require_rate, value_at
from kfac_np.validation import (
    plain_fields,
    require_in,
    require_integer,
    require_positive,
)

__all__ = ["ConstantDamping", "DampingPolicy", "LevenbergMarquardt"]


_MOST = 1e30  # that λ grows to where updates are taken back: no update is left of it
_CEILING = 1e8  # times a typical eigenvalue: λ that is adapted to no more is down again soon
_NO_FLOOR = 1e-10  # of a typical eigenvalue: far below, the damping of singular factors is rounding


class DampingPolicy(ABC):
    """Chooses λ, the multiple of the identity in the quadratic model.

    Numbers are 0-d arrays (`Scalar`); a method may return one of Python's as well. A policy that
    decides by `if` is right on every device, but makes the step wait on an asynchronous one, which
    `kfac_np.backend.select` does not.

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
    def at(self, k: int, current: Scalar | None) -> Scalar | float:
        """λ for step k, given the one carried over (in the first step, that of `start`)."""

    def start(self, eigenvalue: Callable[[], Scalar]) -> Scalar | float | None:
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
    ) -> Scalar | float:
        """λ after a measurement of ρ, the change of h over what the model predicted.

        ρ is NaN where the model predicts a change that is lost in the rounding of h: it says
        nothing, then. `eigenvalue` as in `start`, of this step's F̂. `noisy` tells whether batches
        differ, so that the batch of the step does not speak for the others.
        """

    def rejected(self, current: Scalar | float, times: int) -> Scalar:
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

    def at(self, k: int, current: Scalar | None) -> float:
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
        λ₀. Without it a typical eigenvalue of F̂ at the first step, the geometric mean over the
        layers' parameters of tr F̂_i / n_i, and 1 where F̂ is 0; multiplying the loss by a number
        multiplies it, too. The published value is 150, for autoencoders of images. Give a number
        when training starts from a network that is already sure of its answers: targets sampled
        from it hardly ever say how much F̂ still is, and λ₀ is then off by powers of ten from draw
        to draw.
    decay : float
        ω₁ for one step, in (0, 1).
    interval : int
        T₁.
    floor : float
        λ / typical eigenvalue is not adapted to less while batches differ, and to no more than 1e8.
        With 0 there are no bounds, as in the paper.

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
    >>> policy.update(1.0, 0.9, lambda: 3.0)  # the floor
    0.9
    """

    initial: float | None = None
    decay: float = 0.5 ** (1 / 5)
    interval: int = 5
    floor: float = 0.3

    def __post_init__(self) -> None:
        plain_fields(self)
        if self.initial is not None:
            require_positive("LevenbergMarquardt initial", self.initial)
        require_positive("LevenbergMarquardt floor", self.floor, zero=True)
        require_integer("LevenbergMarquardt interval", self.interval)
        require_in("LevenbergMarquardt decay", self.decay, "(0, 1)")

    def start(self, eigenvalue: Callable[[], Scalar]) -> Scalar | float:
        if self.initial is not None:
            return self.initial
        found = eigenvalue()
        return select(found > 0.0, found, 1.0)

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
        if self.floor == 0.0:
            return new
        typical = eigenvalue()
        telling = rho == rho
        lower = select(omega * current > typical, omega * current, typical)
        new = select(telling, new, select(current > typical, lower, current))
        least = (self.floor if noisy else _NO_FLOOR) * typical
        new = select(new > least, new, least)
        most = max(_CEILING, self.floor) * typical
        most = select(most > omega * current, most, omega * current)  # down, but step by step
        return select((new > most) & (typical > 0.0), most, new)
