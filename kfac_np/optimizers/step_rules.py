"""From a proposal to an update: how far to go, and how much of the previous update to keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from kfac_np import trees
from kfac_np.backend import DeferredChecks, Scalar, array_namespace, select
from kfac_np.errors import DivergenceError
from kfac_np.optimizers.schedules import Schedule, require_rate, value_at
from kfac_np.trees import Tree
from kfac_np.validation import plain_fields, require_fraction, require_in, require_positive

if TYPE_CHECKING:
    from kfac_np.optimizers.quadratic_model import LocalModel

__all__ = ["Choice", "FixedRate", "StepRule"]


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

    alpha: Scalar | float
    mu: Scalar | float
    decrease: Scalar | None

    def update(self, proposal: Tree, previous: Tree | None) -> Tree:
        """δ = αΔ + μδ₀; αΔ without a previous update."""
        if previous is None:
            return trees.scale(self.alpha, proposal)
        return trees.combine(self.alpha, proposal, self.mu, previous)


def require_finite_choice(choice: Choice, k: int, checks: DeferredChecks) -> None:
    """It is a `DivergenceError` if the model was not finite along the proposal.

    Examples
    --------
    >>> import numpy as np
    >>> require_finite_choice(Choice(0.0, 0.0, np.float64("inf")), 7, DeferredChecks())
    Traceback (most recent call last):
    kfac_np.errors.DivergenceError: step 7: the quadratic model is not finite along the ...
    """
    decrease = choice.decrease
    if decrease is not None:
        checks.require(
            array_namespace(decrease).isfinite(decrease),
            lambda: DivergenceError(
                f"step {k}: the quadratic model is not finite along the proposed update; the "
                "parameters are unchanged. Use more damping, or scale the data"
            ),
        )


class StepRule(ABC):
    """Chooses the coefficients α and μ for a proposal Δ.

    Examples
    --------
    >>> FixedRate(0.1).compares
    False
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
        """How many examples it uses at least, where the mini-batch has so many.

        The statistics use a quarter of that number at least.
        """
        return 256

    @property
    def interval(self) -> int:
        """Steps for which a choice holds at most: see `QuadraticModel`."""
        return 1

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
            require_in("FixedRate momentum", self.momentum, "[0, 1)")
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
        rate, momentum = value_at(self.rate, k), value_at(self.momentum, k)
        if self.kl_clip is None:
            return Choice(rate, momentum, None)
        change = rate**2 * curvature_norm(proposal)
        clipped = change > self.kl_clip
        nu = array_namespace(change).sqrt(self.kl_clip / select(clipped, change, 1.0))
        return Choice(rate * select(clipped, nu, 1.0), momentum, None)
