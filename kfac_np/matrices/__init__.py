"""Symmetric positive semi-definite matrices over parameters, in the forms curvature takes.

Each acts on arrays of the parameter's own shape. Vectorisation is row-major, so that the
Kronecker product G ⊗ A acts as V ↦ G V A on V of shape (d_out, d_in + 1).
"""

from kfac_np.matrices.base import Matrix, Spectral
from kfac_np.matrices.chain import ChainMatrix, Link
from kfac_np.matrices.dense import DenseMatrix, DenseSpectral
from kfac_np.matrices.diagonal import DiagonalMatrix
from kfac_np.matrices.difference import difference_inverse
from kfac_np.matrices.kronecker import KroneckerDiagonal, KroneckerMatrix, KroneckerSpectral
from kfac_np.matrices.scaled import ScaledMatrix
from kfac_np.matrices.stacked import StackedMatrix, StackedSpectral, UnitMatrix, UnitSpectral
from kfac_np.matrices.tree_matrices import BlockDiagonalMatrix, FlattenedMatrix, TreeMatrix

__all__ = [
    "BlockDiagonalMatrix",
    "ChainMatrix",
    "DenseMatrix",
    "DenseSpectral",
    "DiagonalMatrix",
    "FlattenedMatrix",
    "KroneckerDiagonal",
    "KroneckerMatrix",
    "KroneckerSpectral",
    "Link",
    "Matrix",
    "ScaledMatrix",
    "Spectral",
    "StackedMatrix",
    "StackedSpectral",
    "TreeMatrix",
    "UnitMatrix",
    "UnitSpectral",
    "difference_inverse",
]
