"""What curvature is for besides training: uncertainty, influence, compression, several tasks.

All of them begin with a curvature that is fitted to a data set once, by `fit_curvature`.
"""

from kfac_np.applications.fit import fit_curvature
from kfac_np.applications.fitted import FittedCurvature, merge

__all__ = ["FittedCurvature", "fit_curvature", "merge"]
