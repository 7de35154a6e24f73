"""Blocks: the curvature of one parameter, from its statistics."""

from kfac_np.curvature.blocks.by_kind import ByKind, KFACBlock
from kfac_np.curvature.blocks.diagonal import DiagonalBlock
from kfac_np.curvature.blocks.exact import ExactBlock
from kfac_np.curvature.blocks.grouped import GroupedBlock
from kfac_np.curvature.blocks.kronecker import KroneckerBlock
from kfac_np.curvature.blocks.scale_shift import UnitBlock
from kfac_np.curvature.blocks.spectral import SpectralBlock

__all__ = [
    "ByKind",
    "DiagonalBlock",
    "ExactBlock",
    "GroupedBlock",
    "KFACBlock",
    "KroneckerBlock",
    "SpectralBlock",
    "UnitBlock",
]
