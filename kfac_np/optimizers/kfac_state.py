"""What a step of K-FAC hands to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, final

from kfac_np.backend import Scalar
from kfac_np.curvature import Factors, Moments
from kfac_np.curvature.base import Units
from kfac_np.optimizers.base import State
from kfac_np.trees import Tree

__all__ = ["KFACState"]


@final
@dataclass(frozen=True, eq=False)
class KFACState(State):
    """State of `KFAC`.

    Attributes
    ----------
    moments : dict
        Moving averages of the curvature's moments.
    factors : dict or None
        What `Curvature.solve` needs, from the last refresh.
    update : tree or None
        δ₀, the last update.
    damping : Scalar or None
        λ carried over to the next step.
    gamma : float or None
        γ, likewise.
    multipliers : dict or None
        What layers' proposals are multiplied by (`Balance`), by path.
    gamma_ratio : float or None
        γ / √(λ + η) when γ was chosen.
    units : dict
        Units of the parameters that the factors are in, by path.
    previous, previous_average : tree or None
        Parameters and their average before the last update, which may still be taken back.
    objective, error : Scalar or None
        h of these on the last step's batch, and its standard error (of one example none).
    measured : Scalar or None
        h of `params` on that batch, where it was measured.
    rejected : Scalar or bool
        Whether the last step rejected its own update.
    rejections : int
        Updates taken back in a row, before that.
    trouble : int
        The last step whose update was taken back.
    raised : float
        What a given λ is multiplied by, since updates were taken back.
    noisy : bool
        Whether batches differ, as far as is known.
    choice : dict or None
        α and μ of the last model, where they hold for several steps.

    Examples
    --------
    >>> KFACState((), None, 0, {}, None, None, None, None).damping is None
    True
    """

    like_params: ClassVar[tuple[str, ...]] = (
        "params",
        "average",
        "update",
        "previous",
        "previous_average",
    )

    moments: dict[str, Moments]
    factors: dict[str, Factors] | None
    update: Tree | None
    damping: Scalar | None
    gamma: float | None
    multipliers: dict[str, Scalar] | None = None
    gamma_ratio: float | None = None
    units: dict[str, Units] = field(default_factory=dict)
    previous: Tree | None = None
    previous_average: Tree | None = None
    objective: Scalar | None = None
    error: Scalar | None = None
    measured: Scalar | None = None
    rejected: Scalar | bool = False
    rejections: int = 0
    trouble: int = 0
    raised: float = 1.0
    noisy: bool = True
    choice: dict[str, Scalar] | None = None
