"""Curvatures of whole networks: blocks put together, and what is between layers."""

from kfac_np.curvature.networks.block_diagonal import BlockDiagonal
from kfac_np.curvature.networks.ekfac import EKFAC
from kfac_np.curvature.networks.full_kronecker import FullKronecker
from kfac_np.curvature.networks.full_matrix import FullMatrix
from kfac_np.curvature.networks.tridiagonal import BlockTridiagonal

__all__ = ["EKFAC", "BlockDiagonal", "BlockTridiagonal", "FullKronecker", "FullMatrix"]
