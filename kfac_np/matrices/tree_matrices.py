"""Matrices that act on whole trees of parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from kfac_np import trees
from kfac_np.backend import Array, Rng, array_namespace
from kfac_np.matrices.base import Matrix, norm
from kfac_np.trees import Tree

__all__ = ["BlockDiagonalMatrix", "FlattenedMatrix", "TreeMatrix"]


class TreeMatrix(ABC):
    """A symmetric positive semi-definite matrix C acting on trees of parameters.

    The methods are those of `kfac_np.matrices.Matrix`, with trees for operands.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.matrices import DiagonalMatrix
    >>> C = BlockDiagonalMatrix((DiagonalMatrix(np.asarray([3.0])),))
    >>> C.solve((np.asarray([1.0]),), damping=1.0)
    (array([0.25]),)
    """

    @abstractmethod
    def matvec(self, v: Tree) -> Tree:
        """C v."""

    @abstractmethod
    def solve(self, v: Tree, damping: float = 0.0) -> Tree:
        """(C + damping · I)⁻¹ v."""

    @abstractmethod
    def power(self, exponent: float, damping: float = 0.0) -> TreeMatrix:
        """(C + damping · I) to any real power."""

    @abstractmethod
    def trace(self) -> Array:
        """Sum of the diagonal (0-d array)."""

    @abstractmethod
    def diagonal(self) -> Tree:
        """The diagonal, as a tree of the parameters' structure."""

    def block_traces(self) -> dict[str, Array]:
        """The trace's part of each parameter, by paths; empty where there are no blocks."""
        return {}

    @abstractmethod
    def logdet(self, damping: float = 0.0) -> Array:
        """Log-determinant of C + damping · I (0-d array)."""

    @abstractmethod
    def frobenius_norm(self) -> Array:
        """Root of the sum of squared entries (0-d array)."""

    @abstractmethod
    def sample(self, rng: Rng, damping: float = 0.0, *, inverse: bool = False) -> Tree:
        """Draw a tree from N(0, C + damping · I), or from N(0, (C + damping · I)⁻¹)."""

    @abstractmethod
    def to_dense(self) -> Array:
        """C itself, parameters in the order of `trees.ravel`, shape (P, P)."""


@final
@dataclass(frozen=True, eq=False)
class BlockDiagonalMatrix(TreeMatrix):
    """One matrix for each parameter of a tree, and nothing between them.

    Attributes
    ----------
    blocks : tree of Matrix
        In the structure of the parameters.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.matrices import DiagonalMatrix
    >>> C = BlockDiagonalMatrix((DiagonalMatrix(np.ones(2)), DiagonalMatrix(2 * np.ones(1))))
    >>> C.matvec((np.ones(2), np.ones(1)))
    (array([1., 1.]), array([2.]))
    >>> float(C.trace()), C.to_dense().shape
    (4.0, (3, 3))
    """

    blocks: Tree

    def matvec(self, v: Tree) -> Tree:
        return trees.tree_map(lambda block, x: block.matvec(x), self.blocks, v)

    def solve(self, v: Tree, damping: float = 0.0) -> Tree:
        return trees.tree_map(lambda block, x: block.solve(x, damping), self.blocks, v)

    def power(self, exponent: float, damping: float = 0.0) -> BlockDiagonalMatrix:
        return BlockDiagonalMatrix(
            trees.tree_map(lambda block: block.power(exponent, damping), self.blocks)
        )

    def trace(self) -> Array:
        return self._sum(lambda block: block.trace())

    def diagonal(self) -> Tree:
        return trees.tree_map(lambda block: block.diagonal(), self.blocks)

    def block_traces(self) -> dict[str, Array]:
        return {path: block.trace() for path, block in trees.items(self.blocks)}

    def logdet(self, damping: float = 0.0) -> Array:
        return self._sum(lambda block: block.logdet(damping))

    def frobenius_norm(self) -> Array:
        norms = [block.frobenius_norm() for block in trees.leaves(self.blocks)]
        return norm(array_namespace(*norms).stack(norms))

    def sample(self, rng: Rng, damping: float = 0.0, *, inverse: bool = False) -> Tree:
        # One stream for all blocks, in order: blocks are independent, and so are further draws.
        return trees.tree_map(lambda b: b.sample(rng, damping, inverse=inverse), self.blocks)

    def to_dense(self) -> Array:
        dense = [block.to_dense() for block in trees.leaves(self.blocks)]
        xp = array_namespace(*dense)
        total = sum(d.shape[0] for d in dense)
        out = xp.zeros((total, total), dtype=dense[0].dtype, device=dense[0].device)
        start = 0
        for d in dense:
            stop = start + d.shape[0]
            out[start:stop, start:stop] = d
            start = stop
        return out

    def _sum(self, function: Callable[[Matrix], Array]) -> Array:
        parts = [function(block) for block in trees.leaves(self.blocks)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


@final
@dataclass(frozen=True, eq=False)
class FlattenedMatrix(TreeMatrix):
    """A matrix over all parameters together, acting on trees by way of `trees.ravel`.

    Attributes
    ----------
    matrix : Matrix
        Its operand is a vector of P entries.
    like : tree of Array
        Parameters that give the structure.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.matrices import DenseMatrix
    >>> C = FlattenedMatrix(DenseMatrix(np.ones((2, 2)), (2,)), (np.zeros(1), np.zeros(1)))
    >>> C.matvec((np.ones(1), np.ones(1)))
    (array([2.]), array([2.]))
    """

    matrix: Matrix
    like: Tree

    def matvec(self, v: Tree) -> Tree:
        return trees.unravel(self.matrix.matvec(trees.ravel(v)), self.like)

    def solve(self, v: Tree, damping: float = 0.0) -> Tree:
        return trees.unravel(self.matrix.solve(trees.ravel(v), damping), self.like)

    def power(self, exponent: float, damping: float = 0.0) -> FlattenedMatrix:
        return FlattenedMatrix(self.matrix.power(exponent, damping), self.like)

    def trace(self) -> Array:
        return self.matrix.trace()

    def diagonal(self) -> Tree:
        return trees.unravel(self.matrix.diagonal(), self.like)

    def logdet(self, damping: float = 0.0) -> Array:
        return self.matrix.logdet(damping)

    def frobenius_norm(self) -> Array:
        return self.matrix.frobenius_norm()

    def sample(self, rng: Rng, damping: float = 0.0, *, inverse: bool = False) -> Tree:
        return trees.unravel(self.matrix.sample(rng, damping, inverse=inverse), self.like)

    def to_dense(self) -> Array:
        return self.matrix.to_dense()
