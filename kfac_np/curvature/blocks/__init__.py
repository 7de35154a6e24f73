"""Blocks: the curvature of one parameter, from its statistics."""

from kfac_np.curvature.blocks.by_kind import ByKind, KFACBlock
from kfac_np.curvature.blocks.grouped import GroupedBlock
from kfac_np.curvature.blocks.kronecker import KroneckerBlock
from kfac_np.curvature.blocks.scale_shift import UnitBlock

__all__ = ["ByKind", "GroupedBlock", "KFACBlock", "KroneckerBlock", "UnitBlock"]
