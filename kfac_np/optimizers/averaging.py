"""The average of the iterates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from kfac_np import trees
from kfac_np.trees import Tree
from kfac_np.validation import plain_fields, require_in, require_positive

__all__ = ["IterateAverage"]


@final
@dataclass(frozen=True)
class IterateAverage:
    """θ̄ ← ξ θ̄ + (1 - ξ) θ after every step, from θ̄ = θ₀.

    Parameters
    ----------
    decay : float
        ξ, in [0, 1).
    power : float, optional
        p ≥ 0. With it the weight is ξ_k = min(1 - (p + 1)/(k + p), ξ), so that the initial
        parameters leave no trace: iterate j has weight about j^p in the mean of the first iterates,
        which so is over the last of them, k/(p + 1) or so in number. With 0 it is a plain mean,
        which lags far behind as long as the loss falls fast.

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
    power: float | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        if self.power is not None:
            require_positive("IterateAverage power", self.power, zero=True)
        require_in("IterateAverage decay", self.decay, "[0, 1)")

    def update(self, average: Tree, params: Tree, k: int) -> Tree:
        """The average after step k (from 1), given that before it and the new parameters."""
        p, decay = self.power, self.decay
        if p is not None:
            decay = min(1.0 - (p + 1.0) / (k + p), decay)
        return trees.combine(decay, average, 1.0 - decay, params)
