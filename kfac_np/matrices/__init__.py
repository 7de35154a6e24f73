"""Symmetric positive semi-definite matrices over parameters, in the forms curvature takes.

Each acts on arrays of the parameter's own shape. Vectorisation is row-major, so that the
Kronecker product G ⊗ A acts as V ↦ G V A on V of shape (d_out, d_in + 1).
"""

from kfac_np.matrices.base import Matrix, Spectral
from kfac_np.matrices.dense import DenseMatrix, DenseSpectral
from kfac_np.matrices.diagonal import DiagonalMatrix
from kfac_np.matrices.kronecker import KroneckerMatrix, KroneckerSpectral
from kfac_np.matrices.trees import BlockDiagonalMatrix, FlattenedMatrix, TreeMatrix

__all__ = [
    "BlockDiagonalMatrix",
    "DenseMatrix",
    "DenseSpectral",
    "DiagonalMatrix",
    "FlattenedMatrix",
    "KroneckerMatrix",
    "KroneckerSpectral",
    "Matrix",
    "Spectral",
    "TreeMatrix",
]
