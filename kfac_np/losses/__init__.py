"""Losses: negative log-likelihoods in natural parameters, one value for each loss term.

Summed over output coordinates; nothing here averages over examples.
"""

from kfac_np.losses.base import DiagonalLoss, Loss
from kfac_np.losses.poisson import PoissonLogRate
from kfac_np.losses.sigmoid import SigmoidCrossEntropy
from kfac_np.losses.softmax import SoftmaxCrossEntropy
from kfac_np.losses.squared import SquaredError

__all__ = [
    "DiagonalLoss",
    "Loss",
    "PoissonLogRate",
    "SigmoidCrossEntropy",
    "SoftmaxCrossEntropy",
    "SquaredError",
]
