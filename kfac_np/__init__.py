"""Kronecker-factored curvature without an autodiff framework, by Array API calls.

The names most programs need are here; every other one is in the module of its floor
(`kfac_np.layers`, `kfac_np.losses`, `kfac_np.fisher`, `kfac_np.curvature`, ...).
"""

import kfac_np._blas  # noqa: F401  before NumPy
from kfac_np.backend import Backend, Rng, get_backend
from kfac_np.curvature import (
    EKFAC,
    BlockDiagonal,
    BlockTridiagonal,
    DiagonalBlock,
    ExactBlock,
    FullKronecker,
    FullMatrix,
    KFACBlock,
    describe,
    quality,
)
from kfac_np.errors import KfacError
from kfac_np.fisher import Empirical, Exact, InputOnly, MonteCarlo
from kfac_np.layers import (
    GELU,
    Dense,
    Flatten,
    Identity,
    LeakyReLU,
    Logistic,
    ReLU,
    Residual,
    Sequential,
    SiLU,
    Softplus,
    Tanh,
)
from kfac_np.losses import PoissonLogRate, SigmoidCrossEntropy, SoftmaxCrossEntropy, SquaredError
from kfac_np.objective import Objective
from kfac_np.optimizers import KFAC, SGD, Adam, practical, published

__version__ = "0.1.0"

__all__ = [
    "EKFAC",
    "GELU",
    "KFAC",
    "SGD",
    "Adam",
    "Backend",
    "BlockDiagonal",
    "BlockTridiagonal",
    "Dense",
    "DiagonalBlock",
    "Empirical",
    "Exact",
    "ExactBlock",
    "Flatten",
    "FullKronecker",
    "FullMatrix",
    "Identity",
    "InputOnly",
    "KFACBlock",
    "KfacError",
    "LeakyReLU",
    "Logistic",
    "MonteCarlo",
    "Objective",
    "PoissonLogRate",
    "ReLU",
    "Residual",
    "Rng",
    "Sequential",
    "SiLU",
    "SigmoidCrossEntropy",
    "SoftmaxCrossEntropy",
    "Softplus",
    "SquaredError",
    "Tanh",
    "describe",
    "get_backend",
    "practical",
    "published",
    "quality",
]
