"""Curvature approximations of the Fisher matrix, F̂.

Each has second moments of the statistics, averaged over mini-batches (`Curvature.estimate`),
factors made from them every few steps (`Curvature.factorise`), and F̂⁻¹ applied to a gradient in
every step (`Curvature.solve`).
"""

from kfac_np.curvature.analysis.describe import describe
from kfac_np.curvature.analysis.kfc_theory import Assumption, convolution_block, kfc_factors
from kfac_np.curvature.analysis.quality import LayerQuality, Quality, quality
from kfac_np.curvature.base import Block, Curvature, Factors, Moments
from kfac_np.curvature.blocks.by_kind import KFACBlock
from kfac_np.curvature.blocks.diagonal import DiagonalBlock
from kfac_np.curvature.blocks.exact import ExactBlock
from kfac_np.curvature.blocks.scale_shift import UnitBlock
from kfac_np.curvature.damping_rules import (
    DampingRule,
    no_pi,
    pi_frobenius,
    pi_spectral,
    pi_trace,
    plain,
)
from kfac_np.curvature.ladder import Ladder, LadderEvent
from kfac_np.curvature.networks.block_diagonal import BlockDiagonal
from kfac_np.curvature.networks.ekfac import EKFAC
from kfac_np.curvature.networks.full_kronecker import FullKronecker
from kfac_np.curvature.networks.full_matrix import FullMatrix
from kfac_np.curvature.networks.tridiagonal import BlockTridiagonal
from kfac_np.curvature.networks.tridiagonal_chains import find_chains
from kfac_np.curvature.sharing import expand, reduce

__all__ = [
    "EKFAC",
    "Assumption",
    "Block",
    "BlockDiagonal",
    "BlockTridiagonal",
    "Curvature",
    "DampingRule",
    "DiagonalBlock",
    "ExactBlock",
    "Factors",
    "FullKronecker",
    "FullMatrix",
    "KFACBlock",
    "Ladder",
    "LadderEvent",
    "LayerQuality",
    "Moments",
    "Quality",
    "UnitBlock",
    "convolution_block",
    "describe",
    "expand",
    "find_chains",
    "kfc_factors",
    "no_pi",
    "pi_frobenius",
    "pi_spectral",
    "pi_trace",
    "plain",
    "quality",
    "reduce",
]
