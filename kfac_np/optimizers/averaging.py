"""Averages over the steps: of the iterates, and of the curvature's moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from kfac_np import trees
from kfac_np.trees import Tree
from kfac_np.validation import plain_fields, require_flag, require_in, require_positive

__all__ = ["IterateAverage", "MovingAverage"]


@final
@dataclass(frozen=True)
class IterateAverage:
    """θ̄ ← ξ θ̄ + (1 - ξ) θ after every step, from θ̄ = θ₀.

    Parameters
    ----------
    decay : float
        ξ, in [0, 1).
    warm_up : bool
        Use ξ_k = min(1 - (p + 1)/(k + p), ξ) instead, with p = `power`: so that the initial
        parameters leave no trace.
    power : float
        p ≥ 0; iterate j has weight about j^p in the mean of the first iterates, which so is over
        the last of them, k/(p + 1) or so in number. With 0 it is a plain mean, which lags far
        behind as long as the loss falls fast. Without effect unless `warm_up`.

    References
    ----------
    Martens & Grosse 2015, §8 and §13 (Polyak averaging with ξ = 0.99); Shamir & Zhang 2013,
    arXiv:1212.1824, §4 (polynomial-decay averaging).

    Examples
    --------
    >>> average = IterateAverage(0.5)
    >>> average.update((0.0,), (1.0,), 1)
    (0.5,)
    """

    decay: float = 0.99
    warm_up: bool = False
    power: float = 0.0

    def __post_init__(self) -> None:
        plain_fields(self)
        require_flag("IterateAverage warm_up", self.warm_up)
        require_positive("IterateAverage power", self.power, zero=True)
        require_in("IterateAverage decay", self.decay, "[0, 1)")

    def update(self, average: Tree, params: Tree, k: int) -> Tree:
        """The average after step k (from 1), given that before it and the new parameters."""
        p = self.power
        decay = min(1.0 - (p + 1.0) / (k + p), self.decay) if self.warm_up else self.decay
        return trees.combine(decay, average, 1.0 - decay, params)


@final
@dataclass(frozen=True)
class MovingAverage:
    """Moments ← ε moments + (1 - ε) new, ε = min(1 - 1/k, decay): a plain mean at first.

    References
    ----------
    Martens & Grosse 2015, §5.

    Examples
    --------
    >>> MovingAverage().epsilon(1), MovingAverage().epsilon(4), MovingAverage().epsilon(1000)
    (0.0, 0.75, 0.95)
    """

    decay: float = 0.95

    def __post_init__(self) -> None:
        plain_fields(self)
        require_in("MovingAverage decay", self.decay, "[0, 1)")

    def epsilon(self, k: int) -> float:
        """Weight of the old moments when they are renewed for the k-th time."""
        return min(1.0 - 1.0 / k, self.decay)
