"""γ, the damping of the factors: which values are tried, and when."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

from kfac_np.errors import ConfigError
from kfac_np.validation import (
    plain_fields,
    require_in,
    require_integer,
    require_number,
)

__all__ = ["CoupledGamma", "GammaPolicy", "GammaSearch", "RelativeGammaSearch"]


class GammaPolicy(ABC):
    """Chooses γ: the factors approximate F + γ² I.

    Examples
    --------
    >>> GammaSearch().searches(20), GammaSearch().searches(21)
    (True, False)
    """

    thorough: ClassVar[bool] = True
    """Whether all candidates are tried; else none after the first that is better than the first of
    all."""
    relative: ClassVar[bool] = False
    """Whether γ is multiplied as √(λ + η) is, from step to step."""

    @abstractmethod
    def candidates(self, k: int, current: float | None, damping: float) -> tuple[float, ...]:
        """Values of γ to try at step k, one after the other; that with the least M(δ) is kept.

        `current` is None before the first step; `damping` is λ + η.
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
    """γ₀ = √(λ₀ + η); every `interval` steps the best of {γ, ω₂ γ, γ / ω₂}, ω₂ = decay^interval.

    Needs a step rule that evaluates the quadratic model.

    Parameters
    ----------
    interval : int
        T₂.
    decay : float
        ω₂ for one step, in (0, 1).
    minimum, maximum : float
        The smaller candidate is at least `minimum`, the larger one at most `maximum`; γ itself
        stays a candidate. The paper states no bounds; without an upper one the search can drift
        away for good, since far above the factors' eigenvalues F̂ ∝ I and every candidate is as
        good as any other. The companion code of the paper uses 1 (and √η below).

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

    def __post_init__(self) -> None:
        plain_fields(self)
        require_integer("GammaSearch interval", self.interval)
        require_in("GammaSearch decay", self.decay, "(0, 1)")
        for name in ("minimum", "maximum"):
            require_number(f"GammaSearch {name}", getattr(self, name))
        if not 0.0 <= self.minimum <= self.maximum or math.isinf(self.minimum):
            raise ConfigError(
                f"GammaSearch: expected 0 <= minimum <= maximum, got {self.minimum!r} and "
                f"{self.maximum!r}"
            )

    def candidates(self, k: int, current: float | None, damping: float) -> tuple[float, ...]:
        gamma = math.sqrt(damping) if current is None else current
        if not self.searches(k):
            return (gamma,)
        omega = self.decay**self.interval
        # γ itself stays a candidate even where the bounds exclude it, as at a large λ₀
        smaller, larger = max(omega * gamma, self.minimum), min(gamma / omega, self.maximum)
        return tuple(dict.fromkeys((gamma, smaller, larger)))

    def searches(self, k: int) -> bool:
        return k % self.interval == 0


@final
@dataclass(frozen=True)
class RelativeGammaSearch(GammaPolicy):
    """γ = r √(λ + η): r is searched, and γ follows λ in between.

    r₀ = 0.3: small γ got off plateaus sooner wherever we tried. In step 3 and every `interval`
    steps the candidates are {r, r/2, 2r}, within [1/10, 10]; the first that is better than r is
    taken, and the third is not tried then. r₀ is a guess, and likely a low one: in step 3 the
    larger candidate comes first.

    Needs a step rule that evaluates the quadratic model.

    Parameters
    ----------
    interval : int
        T₂.

    Examples
    --------
    >>> search = RelativeGammaSearch(interval=4)
    >>> search.candidates(1, None, 4.0), search.candidates(3, 1.0, 4.0)
    ((0.6,), (1.0, 2.0, 0.5))
    """

    thorough: ClassVar[bool] = False
    relative: ClassVar[bool] = True

    interval: int = 20

    def __post_init__(self) -> None:
        plain_fields(self)
        require_integer("RelativeGammaSearch interval", self.interval)

    def candidates(self, k: int, current: float | None, damping: float) -> tuple[float, ...]:
        root = math.sqrt(damping)
        gamma = _RATIO * root if current is None else current
        if not self.searches(k):
            return (gamma,)
        # γ itself stays a candidate even where it is out of bounds; without λ there are none
        smaller = max(0.5 * gamma, root / _BOUND)
        larger = min(2.0 * gamma, root * _BOUND) if root else 2.0 * gamma
        others = (larger, smaller) if k == _FIRST_SEARCH else (smaller, larger)
        return tuple(dict.fromkeys((gamma, *others)))

    def searches(self, k: int) -> bool:
        return k % self.interval == 0 or k == _FIRST_SEARCH


_RATIO = 0.3  # γ₀ / √(λ₀ + η)
_BOUND = 10.0  # of the ratio: far above the factors' eigenvalues every candidate is as good
_FIRST_SEARCH = 3  # when the second proposal has been seen to work or not
