"""What a curvature costs, how good it is, and what its approximations assume."""

from kfac_np.curvature.analysis.costs import costs
from kfac_np.curvature.analysis.describe import describe
from kfac_np.curvature.analysis.kfc_theory import Assumption, convolution_block, kfc_factors
from kfac_np.curvature.analysis.quality import LayerQuality, Quality, quality

__all__ = [
    "Assumption",
    "LayerQuality",
    "Quality",
    "convolution_block",
    "costs",
    "describe",
    "kfc_factors",
    "quality",
]
