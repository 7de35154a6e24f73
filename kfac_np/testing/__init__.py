"""Checks for your own layers, losses and curvatures: the laws that this library's tests run.

Each `check_...` raises `AssertionError` with a message that names the law, what was expected and
what came; see docs/adding.md.
"""

from kfac_np.testing.curvature import CURVATURE_LAWS, check_block, check_curvature
from kfac_np.testing.layers import LAYER_LAWS, check_layer
from kfac_np.testing.losses import LOSS_LAWS, check_loss

__all__ = [
    "CURVATURE_LAWS",
    "LAYER_LAWS",
    "LOSS_LAWS",
    "check_block",
    "check_curvature",
    "check_layer",
    "check_loss",
]
