"""What curvature is for besides training: uncertainty, influence, compression, several tasks.

All of them begin with a curvature that is fitted to a data set once, by `fit_curvature`.
"""

from kfac_np.applications.biases import separate_biases
from kfac_np.applications.continual import ewc, merge_networks, online_laplace
from kfac_np.applications.datamodelling import linear_datamodelling_score, random_halves
from kfac_np.applications.fit import fit_curvature
from kfac_np.applications.fitted import FittedCurvature, merge
from kfac_np.applications.influence import Extremes, Influence, MeanEigenvalue, extremes
from kfac_np.applications.laplace import Laplace
from kfac_np.applications.laplace_precision import Precision
from kfac_np.applications.laplace_predictive import Prediction
from kfac_np.applications.leave_one_out import leave_one_out
from kfac_np.applications.pruning import prune
from kfac_np.applications.pruning_round import Pruned
from kfac_np.applications.sandwich import Sandwich

__all__ = [
    "Extremes",
    "FittedCurvature",
    "Influence",
    "Laplace",
    "MeanEigenvalue",
    "Precision",
    "Prediction",
    "Pruned",
    "Sandwich",
    "ewc",
    "extremes",
    "fit_curvature",
    "leave_one_out",
    "linear_datamodelling_score",
    "merge",
    "merge_networks",
    "online_laplace",
    "prune",
    "random_halves",
    "separate_biases",
]
