"""A matrix over all parameters whose inverse is block-tridiagonal along chains of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import final

from kfac_np import trees
from kfac_np.backend import Array, Rng, array_namespace
from kfac_np.errors import CurvatureError
from kfac_np.matrices.base import Matrix, norm
from kfac_np.matrices.dense import DenseMatrix
from kfac_np.matrices.kronecker import KroneckerMatrix, kron
from kfac_np.matrices.tree_matrices import FlattenedMatrix, TreeMatrix
from kfac_np.trees import Tree

__all__ = ["ChainMatrix", "Link"]

_MAX_DENSE = 20_000  # parameters: a dense matrix of them takes 3 GB


@final
@dataclass(frozen=True, eq=False)
class Link:
    """Ψ = Ψ^G ⊗ Ψ^A, from a parameter to the one that follows it: V ↦ Ψ^G V Ψ^Aᵀ.

    Attributes
    ----------
    following : str
        Path of the parameter that follows.
    A : Array, shape (d_in, d_in of the following)
        Ψ^A.
    G : Array, shape (d_out, d_out of the following)
        Ψ^G.

    Examples
    --------
    >>> import numpy as np
    >>> link = Link("2", A=np.asarray([[1.0], [2.0]]), G=np.asarray([[3.0]]))
    >>> link.apply(np.ones((1, 1))), link.transposed(np.ones((1, 2)))
    (array([[3., 6.]]), array([[9.]]))
    """

    following: str
    A: Array
    G: Array

    def apply(self, v: Array) -> Array:
        """Ψ v, v of the following parameter's shape."""
        return self.G @ v @ self.A.T

    def transposed(self, v: Array) -> Array:
        """Ψᵀ v, in the following parameter's shape."""
        return self.G.T @ v @ self.A


@final
@dataclass(frozen=True, eq=False)
class ChainMatrix(TreeMatrix):
    """F̂ = Ξ⁻¹ Λ⁻¹ Ξ⁻ᵀ: given diagonal and neighbouring blocks, an inverse that is tridiagonal.

    Blocks (i, i) are those given, (i, i + 1) is Ψ_i F_{i+1}, and block (i, j) is the product
    Ψ_i ⋯ Ψ_{j-1} F_j: of all matrices with these diagonal and neighbouring blocks, this is the one
    whose inverse is block-tridiagonal (a Gaussian with it as covariance is a Markov chain).
    Parameters without a link are coupled to nothing after them.

    `matvec`, `trace` and `frobenius_norm` are taken in factored form, by products alone: no
    inverse and no power of a matrix. `solve`, `power`, `logdet` and `sample` mean the matrix plus
    damping · I exactly, which has no factored form: they go through `to_dense` and are for small
    networks. (What training needs is `BlockTridiagonal.factorise` and `solve`.)

    Attributes
    ----------
    blocks : mapping of path to Matrix
        F_i, a `KroneckerMatrix` where there is a link from it or to it.
    links : mapping of path to Link
        Ψ_i.
    like : tree of Array
        Parameters that give the structure; a link leads to a later parameter.

    References
    ----------
    Martens & Grosse 2015, §4.3 and appendix B.

    Examples
    --------
    >>> import numpy as np
    >>> blocks = {n: KroneckerMatrix(np.eye(1), 2.0 * np.eye(1)) for n in ("0", "1", "2")}
    >>> half = {"0": Link("1", 0.5 * np.eye(1), np.eye(1)), "1": Link("2", 0.5 * np.eye(1),
    ...     np.eye(1))}
    >>> C = ChainMatrix(blocks, half, tuple(np.ones((1, 1)) for _ in blocks))
    >>> C.to_dense()
    array([[2. , 1. , 0.5],
           [1. , 2. , 1. ],
           [0.5, 1. , 2. ]])
    >>> C.matvec(C.like)
    (array([[3.5]]), array([[4.]]), array([[3.5]]))
    """

    blocks: Mapping[str, Matrix]
    links: Mapping[str, Link]
    like: Tree

    def matvec(self, v: Tree) -> Tree:
        z = dict(trees.items(v))  # becomes Ξ⁻ᵀ v
        pulled = {}
        for path in z:
            if path in self.links:
                link = self.links[path]
                pulled[path] = link.transposed(z[path])
                z[link.following] = z[link.following] + pulled[path]
        out: dict[str, Array] = {}
        for path in reversed(z):
            out[path] = self.blocks[path].matvec(z[path])
            if path in self.links:
                # Σ_i z_i = F_i z_i - Ψ_i F_{i+1} Ψ_iᵀ z_i, and then Ξ⁻¹: both have Ψ_i on the left.
                link = self.links[path]
                below = self.blocks[link.following].matvec(pulled[path])
                out[path] = out[path] + link.apply(out[link.following] - below)
        return trees.map_named(lambda path, _: out[path], v)

    def trace(self) -> Array:
        parts = list(self.block_traces().values())
        return array_namespace(*parts).sum(array_namespace(*parts).stack(parts))

    def diagonal(self) -> Tree:
        return trees.map_named(lambda path, _: self.blocks[path].diagonal(), self.like)

    def block_traces(self) -> dict[str, Array]:
        return {path: self.blocks[path].trace() for path, _ in trees.items(self.like)}

    def frobenius_norm(self) -> Array:
        norms = [self.blocks[path].frobenius_norm() for path, _ in trees.items(self.like)]
        norms += [2.0**0.5 * (norm(a) * norm(g)) for _, _, a, g in self._couplings()]
        return norm(array_namespace(*norms).stack(norms))

    def to_dense(self) -> Array:
        places: dict[str, slice] = {}
        total = 0
        for path, p in trees.items(self.like):
            size = math.prod(p.shape)
            places[path] = slice(total, total + size)
            total += size
        if total > _MAX_DENSE:
            raise CurvatureError(
                f"ChainMatrix: expected at most {_MAX_DENSE} parameters for a dense matrix, "
                f"got {total}"
            )
        first = self.blocks[next(iter(places))].to_dense()
        out = array_namespace(first).zeros((total, total), dtype=first.dtype, device=first.device)
        for path, place in places.items():
            out[place, place] = self.blocks[path].to_dense()
        for i, j, a, g in self._couplings():
            block = kron(g, a)
            out[places[i], places[j]] = block
            out[places[j], places[i]] = block.T
        return out

    def solve(self, v: Tree, damping: float = 0.0) -> Tree:
        return self._flattened.solve(v, damping)

    def power(self, exponent: float, damping: float = 0.0) -> FlattenedMatrix:
        return self._flattened.power(exponent, damping)

    def logdet(self, damping: float = 0.0) -> Array:
        return self._flattened.logdet(damping)

    def sample(self, rng: Rng, damping: float = 0.0, *, inverse: bool = False) -> Tree:
        return self._flattened.sample(rng, damping, inverse=inverse)

    @cached_property
    def _flattened(self) -> FlattenedMatrix:
        dense = self.to_dense()
        return FlattenedMatrix(DenseMatrix(dense, (dense.shape[0],)), self.like)

    def _couplings(self) -> Iterator[tuple[str, str, Array, Array]]:
        """Paths i and j of every two coupled parameters, and the factors of their block."""
        for start, link in self.links.items():
            a, g = link.A, link.G
            while True:
                block = self.blocks[link.following]
                assert isinstance(block, KroneckerMatrix), "links are of Kronecker products"
                yield start, link.following, a @ block.A, g @ block.G
                if link.following not in self.links:
                    break
                link = self.links[link.following]
                a, g = a @ link.A, g @ link.G
