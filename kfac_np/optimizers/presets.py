"""K-FAC composed for a use: as published, by the kind of network, with a given rate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kfac_np.objective import Objective
from kfac_np.optimizers.averaging import IterateAverage
from kfac_np.optimizers.balance import Balance
from kfac_np.optimizers.damping import ConstantDamping, LevenbergMarquardt
from kfac_np.optimizers.gamma import CoupledGamma, GammaSearch
from kfac_np.optimizers.kfac import KFAC
from kfac_np.optimizers.moments import MovingAverage
from kfac_np.optimizers.quadratic_model import QuadraticModel
from kfac_np.optimizers.schedules import Refresh, Schedule
from kfac_np.optimizers.step_rules import FixedRate

__all__ = ["kfac_autoencoder", "kfac_convolutional", "kfc_pre", "practical", "published"]


def published(objective: Objective, **changes: Any) -> KFAC:
    """K-FAC with every constant as its paper's text has it; `changes` replace single fields.

    References
    ----------
    Martens & Grosse 2015, §§5-8 and §13.

    Examples
    --------
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> kfac = published(Objective(Dense(2, 1), SquaredError()))
    >>> kfac.damping.initial, kfac.refresh.interval, kfac.statistics_fraction
    (150.0, 20, 0.125)
    """
    kfac = KFAC(
        objective,
        step_rule=QuadraticModel(bounded=False, least_examples=1),
        damping=LevenbergMarquardt(initial=150.0, decay=19 / 20, floor=0.0),
        gamma=GammaSearch(),
        averaging=IterateAverage(),
        refresh=Refresh(),
        statistics_fraction=1 / 8,
        l2=1e-5,
        relative=False,
        guard=None,
    )
    return replace(kfac, **changes)


def kfac_autoencoder(objective: Objective, **changes: Any) -> KFAC:
    """K-FAC for autoencoders of images: balanced layers, and a model of fewer examples.

    `KFAC(objective)` with a `Balance`, and with a quadratic model that uses a quarter of the
    mini-batch where that is 125 examples instead of 256: an image that is reconstructed tells more
    of F than a label does. It wants batches of 500 and more; fewer examples tell too little of
    each layer's curvature. What it gains is in docs/results.md, "Balanced layers".

    Parameters
    ----------
    objective : Objective
    **changes
        Replace other fields of `KFAC`.

    Examples
    --------
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SigmoidCrossEntropy
    >>> kfac = kfac_autoencoder(Objective(Dense(2, 2), SigmoidCrossEntropy()))
    >>> kfac.balance is None, kfac.step_rule.least_examples
    (False, 125)
    """
    kfac = KFAC(objective, balance=Balance(), step_rule=QuadraticModel(least_examples=125))
    return replace(kfac, **changes)


def kfac_convolutional(objective: Objective, **changes: Any) -> KFAC:
    """K-FAC for convolutional networks: all but the gradient in every fifth step.

    `KFAC(objective)` with statistics, factors and the quadratic model of every fifth step, ten
    steps in which λ settles, and an average over fewer iterates. Statistics are of a quarter of the
    mini-batch (64 examples at least), since each of its locations counts as an example. It has no
    momentum. A step takes about one and a half times as long as one of SGD. What it gains is in
    docs/results.md, "Convolutional network".

    Parameters
    ----------
    objective : Objective
    **changes
        Replace other fields of `KFAC`.

    Examples
    --------
    >>> from kfac_np.layers import Conv, Flatten, Sequential
    >>> from kfac_np.losses import SoftmaxCrossEntropy
    >>> net = Sequential(Conv(1, 3, (3, 3)), Flatten())
    >>> kfac = kfac_convolutional(Objective(net, SoftmaxCrossEntropy()))
    >>> kfac.step_rule.interval, kfac.moving_average.interval, kfac.refresh.interval
    (5, 5, 5)
    """
    kfac = KFAC(
        objective,
        step_rule=QuadraticModel(interval=5, momentum=False),
        moving_average=MovingAverage(interval=5),
        refresh=Refresh(interval=5, first=1),
        averaging=IterateAverage(decay=0.97, power=19.0),
        statistics_fraction=0.25,
    )
    return replace(kfac, **changes)


def practical(
    objective: Objective,
    rate: float | Schedule = 0.1,
    *,
    momentum: float = 0.9,
    damping: float | Schedule = 1e-2,
    kl_clip: float | None = 1e-2,
    **changes: Any,
) -> KFAC:
    """K-FAC for highly stochastic training: given rate and damping, momentum, KL clip.

    Parameters
    ----------
    objective : Objective
    rate : float or Schedule
    momentum : float
    damping : float or Schedule
        λ; γ = √(λ + η).
    kl_clip : float or None
    **changes
        Replace other fields of `KFAC`.

    References
    ----------
    Ba, Grosse & Martens 2017, §5; Grosse & Martens 2016, §6.

    Examples
    --------
    >>> from kfac_np.layers import Dense
    >>> from kfac_np.losses import SquaredError
    >>> kfac = practical(Objective(Dense(2, 1), SquaredError()), rate=0.05)
    >>> kfac.step_rule.rate, kfac.damping.value
    (0.05, 0.01)
    """
    kfac = KFAC(
        objective,
        step_rule=FixedRate(rate, momentum, kl_clip),
        damping=ConstantDamping(damping),
        gamma=CoupledGamma(),
        statistics_fraction=1.0,
        l2=1e-5,
        relative=False,
    )
    return replace(kfac, **changes)


def kfc_pre(
    objective: Objective,
    rate: float | Schedule = 0.01,
    *,
    momentum: float = 0.9,
    damping: float | Schedule = 0.03,
    **changes: Any,
) -> KFAC:
    """SGD with momentum on gradients that the inverse curvature has preconditioned ("KFC-pre").

    v ← μ v - α F̂⁻¹ ∇h, θ ← θ + v, and the average of the iterates for use. No part of the step
    looks at the loss or at a quadratic model; statistics are renewed every fifth step, on the whole
    mini-batch, and factors every tenth. The composition is the paper's, the constants are
    ours.

    Parameters
    ----------
    objective : Objective
    rate : float or Schedule
        α.
    momentum : float
        μ.
    damping : float or Schedule
        λ, fixed; γ = √(λ + η).
    **changes
        Replace other fields of `KFAC`.

    References
    ----------
    Grosse & Martens 2016, arXiv:1602.01407, §4 (as a preconditioner for SGD).

    Examples
    --------
    >>> from kfac_np.layers import Conv, Flatten, Sequential
    >>> from kfac_np.losses import SoftmaxCrossEntropy
    >>> net = Sequential(Conv(1, 3, (3, 3)), Flatten())
    >>> kfac = kfc_pre(Objective(net, SoftmaxCrossEntropy()), rate=0.01)
    >>> kfac.step_rule.kl_clip is None, kfac.moving_average.interval
    (True, 5)
    """
    kfac = practical(objective, rate, momentum=momentum, damping=damping, kl_clip=None)
    changes = {"moving_average": MovingAverage(interval=5), **changes}
    return replace(kfac, **changes)
