"""Optimisers: frozen settings composed of small parts, with explicit state.

`state = optimizer.init(params)`, then `state, report = optimizer.step(state, x, t)` as often as
wanted. A step never changes the state it is given.
"""

from kfac_np.optimizers.adam import Adam
from kfac_np.optimizers.averaging import IterateAverage
from kfac_np.optimizers.balance import Balance
from kfac_np.optimizers.base import Optimizer, State
from kfac_np.optimizers.damping import ConstantDamping, DampingPolicy, LevenbergMarquardt
from kfac_np.optimizers.gamma import CoupledGamma, GammaPolicy, GammaSearch, RelativeGammaSearch
from kfac_np.optimizers.guard import Guard
from kfac_np.optimizers.kfac import KFAC
from kfac_np.optimizers.kfac_state import KFACState
from kfac_np.optimizers.moments import MovingAverage
from kfac_np.optimizers.presets import (
    kfac_autoencoder,
    kfac_convolutional,
    kfc_pre,
    practical,
    published,
)
from kfac_np.optimizers.quadratic_model import LocalModel, QuadraticModel
from kfac_np.optimizers.reports import StepReport
from kfac_np.optimizers.schedules import (
    Constant,
    Cosine,
    Exponential,
    Inverse,
    Piecewise,
    Refresh,
    Schedule,
    Shrinking,
)
from kfac_np.optimizers.sgd import SGD
from kfac_np.optimizers.step_rules import Choice, FixedRate, StepRule

__all__ = [
    "KFAC",
    "SGD",
    "Adam",
    "Balance",
    "Choice",
    "Constant",
    "ConstantDamping",
    "Cosine",
    "CoupledGamma",
    "DampingPolicy",
    "Exponential",
    "FixedRate",
    "GammaPolicy",
    "GammaSearch",
    "Guard",
    "Inverse",
    "IterateAverage",
    "KFACState",
    "LevenbergMarquardt",
    "LocalModel",
    "MovingAverage",
    "Optimizer",
    "Piecewise",
    "QuadraticModel",
    "Refresh",
    "RelativeGammaSearch",
    "Schedule",
    "Shrinking",
    "State",
    "StepReport",
    "StepRule",
    "kfac_autoencoder",
    "kfac_convolutional",
    "kfc_pre",
    "practical",
    "published",
]
