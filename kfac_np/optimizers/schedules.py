"""What depends on the step k = 1, 2, ...: learning rates, damping, and when to refresh."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from kfac_np.errors import ConfigError
from kfac_np.validation import (
    plain_fields,
    require_flag,
    require_fraction,
    require_integer,
    require_number,
    require_positive,
)

__all__ = [
    "Constant",
    "Cosine",
    "Exponential",
    "Inverse",
    "Piecewise",
    "Refresh",
    "Schedule",
    "Shrinking",
    "value_at",
]


_SHRINKS = 0.8  # in each step: an eighth is reached in step 11, when first averages have settled


class Schedule(ABC):
    """A function of the step number k, counted from 1.

    Examples
    --------
    >>> Exponential(1.0, decay=0.5, every=10)(11)
    0.5
    """

    @abstractmethod
    def __call__(self, k: int) -> float:
        """The value for step k."""


def value_at(value: float | Schedule, k: int) -> float:
    """Evaluate a number or a schedule at step k.

    Raises
    ------
    ConfigError
        The schedule gave something other than a finite number >= 0.

    Examples
    --------
    >>> value_at(0.1, 5), value_at(Constant(0.2), 5)
    (0.1, 0.2)
    """
    if not isinstance(value, Schedule):
        return float(value)
    number = value(k)
    require_positive(f"{type(value).__name__} in step {k}", number, zero=True)
    return float(number)


def require_rate(name: str, value: float | Schedule, *, zero: bool = False) -> None:
    """Raise `ConfigError` unless `value` is a schedule or what `require_positive` asks for.

    Examples
    --------
    >>> require_rate("rate", lambda k: 1.0 / k)
    Traceback (most recent call last):
    kfac_np.errors.ConfigError: rate: expected a number > 0 or a Schedule, got a function
    """
    if callable(value) and not isinstance(value, Schedule):
        raise ConfigError(
            f"{name}: expected a number {'>=' if zero else '>'} 0 or a Schedule, "
            f"got a {type(value).__name__}"
        )
    if not isinstance(value, Schedule):
        require_positive(name, value, zero=zero)


@final
@dataclass(frozen=True)
class Constant(Schedule):
    """The same value at every step.

    Examples
    --------
    >>> Constant(0.1)(1000)
    0.1
    """

    value: float

    def __post_init__(self) -> None:
        plain_fields(self)
        require_positive("Constant value", self.value, zero=True)

    def __call__(self, k: int) -> float:
        return self.value


@final
@dataclass(frozen=True)
class Exponential(Schedule):
    """initial · decay^((k - 1) / every), never below `minimum`.

    A decay above 1 grows; inf beyond the largest float.

    Examples
    --------
    >>> Exponential(8.0, decay=0.5, every=1, minimum=1.0)(10)
    1.0
    """

    initial: float
    decay: float
    every: int = 1
    minimum: float = 0.0

    def __post_init__(self) -> None:
        plain_fields(self)
        require_positive("Exponential initial", self.initial)
        require_positive("Exponential decay", self.decay)
        require_positive("Exponential every", self.every)
        require_positive("Exponential minimum", self.minimum, zero=True)

    def __call__(self, k: int) -> float:
        try:
            return max(self.initial * self.decay ** ((k - 1) / self.every), self.minimum)
        except OverflowError:
            return math.inf


@final
@dataclass(frozen=True)
class Shrinking(Schedule):
    """0.8^(k - 1), never below `to`: a fraction that begins with everything.

    Examples
    --------
    >>> [round(Shrinking(to=0.125)(k), 3) for k in (1, 2, 10, 11, 12)]
    [1.0, 0.8, 0.134, 0.125, 0.125]
    """

    to: float

    def __post_init__(self) -> None:
        plain_fields(self)
        require_fraction("Shrinking to", self.to)

    def __call__(self, k: int) -> float:
        return max(_SHRINKS ** (k - 1), self.to)


@final
@dataclass(frozen=True)
class Inverse(Schedule):
    """initial / (1 + (k - 1) / halving), half of the initial value after `halving` steps.

    Examples
    --------
    >>> Inverse(1.0, halving=100)(101)
    0.5
    """

    initial: float
    halving: float

    def __post_init__(self) -> None:
        plain_fields(self)
        require_positive("Inverse initial", self.initial)
        require_positive("Inverse halving", self.halving)

    def __call__(self, k: int) -> float:
        return self.initial / (1.0 + (k - 1) / self.halving)


@final
@dataclass(frozen=True)
class Cosine(Schedule):
    """Linear rise over `warmup` steps, then half a cosine down to `final` at step `steps`.

    Examples
    --------
    >>> schedule = Cosine(1.0, steps=100, warmup=10)
    >>> schedule(5), round(schedule(55), 3), schedule(100), schedule(200)
    (0.5, 0.5, 0.0, 0.0)
    """

    initial: float
    steps: int
    warmup: int = 0
    final: float = 0.0

    def __post_init__(self) -> None:
        plain_fields(self)
        require_positive("Cosine initial", self.initial)
        require_positive("Cosine steps", self.steps)
        require_positive("Cosine final", self.final, zero=True)
        require_number("Cosine warmup", self.warmup)
        if not 0 <= self.warmup < self.steps:
            raise ConfigError(f"Cosine warmup: expected 0 <= warmup < steps, got {self.warmup}")

    def __call__(self, k: int) -> float:
        if k <= self.warmup:
            return self.initial * k / self.warmup
        progress = min(1.0, (k - self.warmup) / (self.steps - self.warmup))
        return self.final + (self.initial - self.final) * 0.5 * (1.0 + math.cos(math.pi * progress))


@final
@dataclass(frozen=True)
class Piecewise(Schedule):
    """values[i] up to and including step boundaries[i], the last value afterwards.

    Examples
    --------
    >>> schedule = Piecewise(values=(1.0, 0.1), boundaries=(100,))
    >>> schedule(100), schedule(101)
    (1.0, 0.1)
    """

    values: tuple[float, ...]
    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        plain_fields(self)
        for name in ("values", "boundaries"):
            if not isinstance(given := getattr(self, name), tuple):
                raise ConfigError(f"Piecewise {name}: expected a tuple, got {given!r}")
        for boundary in self.boundaries:
            require_number("Piecewise boundaries", boundary)
        if len(self.values) != len(self.boundaries) + 1:
            raise ConfigError(
                f"Piecewise: expected one value more than boundaries, got {len(self.values)} "
                f"values and {len(self.boundaries)} boundaries"
            )
        if list(self.boundaries) != sorted(set(self.boundaries)):
            raise ConfigError(f"Piecewise boundaries: expected to rise, got {self.boundaries}")
        for value in self.values:
            require_positive("Piecewise values", value, zero=True)

    def __call__(self, k: int) -> float:
        passed = sum(k > boundary for boundary in self.boundaries)
        return self.values[passed]


@final
@dataclass(frozen=True)
class Refresh:
    """Something is renewed every `interval` steps, and in each of the `first` steps.

    Parameters
    ----------
    interval, first : int
    spread : bool
        After the first steps, each layer has a step of the interval to itself, or shares it with
        few others, instead of all layers one step.

    References
    ----------
    Martens & Grosse 2015, §8.

    Examples
    --------
    >>> [k for k in range(1, 41) if Refresh().due(k)]
    [1, 2, 3, 20, 40]
    """

    interval: int = 20
    first: int = 3
    spread: bool = False

    def __post_init__(self) -> None:
        plain_fields(self)
        require_integer("Refresh interval", self.interval)
        require_integer("Refresh first", self.first)
        require_flag("Refresh spread", self.spread)

    def due(self, k: int) -> bool:
        """Tell whether step k is one of them."""
        return k <= self.first or k % self.interval == 0

    def share(self, k: int, paths: Sequence[str]) -> tuple[str, ...]:
        """Those of the layers that are renewed in step k.

        Examples
        --------
        >>> refresh = Refresh(interval=4, first=1, spread=True)
        >>> [refresh.share(k, ("0", "2")) for k in range(1, 8)]
        [('0', '2'), ('2',), (), ('0',), (), ('2',), ()]
        """
        if not self.spread or k <= self.first:
            return tuple(paths) if self.due(k) else ()
        turns = enumerate(paths)
        return tuple(
            p for i, p in turns if (k - i * self.interval // len(paths)) % self.interval == 0
        )
