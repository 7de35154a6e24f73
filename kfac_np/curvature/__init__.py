"""Curvature approximations: moments (every step), factorise (now and then), solve (every step)."""

from kfac_np.curvature.base import Block, Curvature, Factors, Moments
from kfac_np.curvature.block_diagonal import BlockDiagonal
from kfac_np.curvature.damping import (
    DampingRule,
    no_pi,
    pi_frobenius,
    pi_spectral,
    pi_trace,
    plain,
)
from kfac_np.curvature.describe import describe
from kfac_np.curvature.diagonal import DiagonalBlock
from kfac_np.curvature.exact import ExactBlock, FullMatrix
from kfac_np.curvature.kfac import KFACBlock
from kfac_np.curvature.ladder import Ladder, LadderEvent
from kfac_np.curvature.sharing import expand, reduce
from kfac_np.curvature.units import UnitBlock

__all__ = [
    "Block",
    "BlockDiagonal",
    "Curvature",
    "DampingRule",
    "DiagonalBlock",
    "ExactBlock",
    "Factors",
    "FullMatrix",
    "KFACBlock",
    "Ladder",
    "LadderEvent",
    "Moments",
    "UnitBlock",
    "describe",
    "expand",
    "no_pi",
    "pi_frobenius",
    "pi_spectral",
    "pi_trace",
    "plain",
    "reduce",
]
