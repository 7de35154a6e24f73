"""Every class of matrix beside the dense matrix that it stands for.

A case is made from host arrays alone, so that it is the same on every backend. To have all laws
run on a new class, add an entry to `CASES` (positive definite) and to `SINGULAR`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kfac_np import trees
from kfac_np.backend import Backend
from kfac_np.matrices import (
    BlockDiagonalMatrix,
    DenseMatrix,
    DenseSpectral,
    DiagonalMatrix,
    FlattenedMatrix,
    KroneckerDiagonal,
    KroneckerMatrix,
    KroneckerSpectral,
    Matrix,
    ScaledMatrix,
    StackedMatrix,
    StackedSpectral,
    TreeMatrix,
    UnitMatrix,
    UnitSpectral,
)
from kfac_np.trees import Tree

HostArray = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Case:
    """A matrix, the same matrix written out on the host, and a tree of its operand's shape."""

    matrix: Matrix | TreeMatrix
    dense: HostArray
    like: Tree
    backend: Backend

    def operand(self, vector: HostArray) -> Tree:
        """A vector from the host in the structure that the matrix acts on."""
        return trees.unravel(self.backend.asarray(vector), self.like)

    def vector(self, seed: int = 0) -> HostArray:
        return np.random.default_rng(seed).standard_normal(self.dense.shape[0])


Maker = Callable[[Backend], Case]


def orthogonal(n: int, seed: int) -> HostArray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]


def positive(n: int, seed: int, low: float = 0.2, high: float = 5.0) -> HostArray:
    """Symmetric positive definite, with eigenvalues from `low` to `high`."""
    u = orthogonal(n, seed)
    m = (u * np.geomspace(low, high, n)) @ u.T
    return 0.5 * (m + m.T)


def gram(n: int, rank: int, seed: int) -> HostArray:
    """A second moment of fewer vectors than dimensions: singular as statistics are singular."""
    rows = np.random.default_rng(seed).standard_normal((rank, n))
    return rows.T @ rows


def kronecker(b: Backend, A: HostArray, G: HostArray) -> Case:
    like = b.zeros((G.shape[0], A.shape[0]))
    return Case(KroneckerMatrix(b.asarray(A), b.asarray(G)), np.kron(G, A), like, b)


def kronecker_spectral(b: Backend, values: HostArray) -> Case:
    d_out, d_in = values.shape
    u_a, u_g = orthogonal(d_in, 3), orthogonal(d_out, 4)
    u = np.kron(u_g, u_a)
    matrix = KroneckerSpectral(b.asarray(values), b.asarray(u_a), b.asarray(u_g))
    return Case(matrix, (u * values.reshape(-1)) @ u.T, b.zeros((d_out, d_in)), b)


def kronecker_diagonal(b: Backend, a: HostArray, G: HostArray) -> Case:
    matrix = KroneckerDiagonal(b.asarray(a), b.asarray(G))
    return Case(matrix, np.kron(G, np.diag(a)), b.zeros((len(G), len(a))), b)


def kronecker_diagonal_spectral(b: Backend, values: HostArray) -> Case:
    """With no eigenvectors of A: None stands for the identity."""
    d_out, d_in = values.shape
    u_g = orthogonal(d_out, 4)
    u = np.kron(u_g, np.eye(d_in))
    matrix = KroneckerSpectral(b.asarray(values), None, b.asarray(u_g))
    return Case(matrix, (u * values.reshape(-1)) @ u.T, b.zeros((d_out, d_in)), b)


def stacked(b: Backend, *parts: Case) -> Case:
    """Blocks along the first axis of one parameter."""
    like = b.zeros((len(parts), *parts[0].like.shape))
    matrix = StackedMatrix(tuple(part.matrix for part in parts))
    return Case(matrix, block_diagonal_of([part.dense for part in parts]), like, b)


def stacked_spectral(b: Backend, values: HostArray) -> Case:
    parts = [kronecker_spectral(b, v) for v in values]
    matrix = StackedSpectral(b.asarray(values), tuple(part.matrix for part in parts))
    whole = block_diagonal_of([part.dense for part in parts])
    return Case(matrix, whole, b.zeros(values.shape), b)


def units(b: Backend, *blocks: HostArray) -> Case:
    """A small block for each column of an operand (r, C)."""
    r, c = len(blocks[0]), len(blocks)
    whole = np.zeros((r, c, r, c))
    for i, block in enumerate(blocks):
        whole[:, i, :, i] = block
    matrix = UnitMatrix(b.asarray(np.stack(blocks)))
    return Case(matrix, whole.reshape(r * c, r * c), b.zeros((r, c)), b)


def units_spectral(b: Backend, values: HostArray) -> Case:
    r, c = values.shape
    u = [orthogonal(r, i) for i in range(c)]
    case = units(b, *((u[i] * values[:, i]) @ u[i].T for i in range(c)))
    matrix = UnitSpectral(b.asarray(values), b.asarray(np.stack(u)))
    return Case(matrix, case.dense, case.like, b)


def dense(b: Backend, m: HostArray, shape: tuple[int, ...]) -> Case:
    return Case(DenseMatrix(b.asarray(m), shape), m, b.zeros(shape), b)


def dense_spectral(b: Backend, values: HostArray, shape: tuple[int, ...]) -> Case:
    u = orthogonal(values.shape[0], 5)
    matrix = DenseSpectral(b.asarray(values), b.asarray(u), shape)
    return Case(matrix, (u * values) @ u.T, b.zeros(shape), b)


def diagonal(b: Backend, values: HostArray) -> Case:
    return Case(
        DiagonalMatrix(b.asarray(values)), np.diag(values.reshape(-1)), b.zeros(values.shape), b
    )


def scaled(b: Backend, case: Case, d: HostArray) -> Case:
    whole = d.reshape(-1)[:, None] * case.dense * d.reshape(-1)
    return Case(ScaledMatrix(case.matrix, b.asarray(d)), whole, case.like, b)


def block_diagonal(b: Backend, a: Case, g: Case, d: Case) -> Case:
    """Three blocks in a nested tree with a parameterless layer in it."""
    whole = block_diagonal_of([case.dense for case in (a, g, d)])
    blocks = (a.matrix, (), {"inner": (g.matrix,), "last": d.matrix})
    like = (a.like, (), {"inner": (g.like,), "last": d.like})
    return Case(BlockDiagonalMatrix(blocks), whole, like, b)


def block_diagonal_of(parts: list[HostArray]) -> HostArray:
    sizes = [len(part) for part in parts]
    whole = np.zeros((sum(sizes), sum(sizes)))
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        whole[start : start + size, start : start + size] = part
        start += size
    return whole


def flattened(b: Backend, m: HostArray) -> Case:
    like = (b.zeros((2, 2)), (), (b.zeros((3,)), b.zeros((1, 1))))
    return Case(FlattenedMatrix(DenseMatrix(b.asarray(m), (8,)), like), m, like, b)


def _spread(*shape: int) -> HostArray:
    values = np.geomspace(0.1, 7.0, int(np.prod(shape)))
    return np.random.default_rng(6).permutation(values).reshape(shape)


CASES: dict[str, Maker] = {
    "kronecker": lambda b: kronecker(b, positive(4, 0), positive(3, 1)),
    "kronecker of one output": lambda b: kronecker(b, positive(5, 2), np.asarray([[0.7]])),
    "kronecker of numbers": lambda b: kronecker(b, np.asarray([[2.0]]), np.asarray([[3.0]])),
    "kronecker spectral": lambda b: kronecker_spectral(b, _spread(3, 4)),
    "kronecker diagonal": lambda b: kronecker_diagonal(b, _spread(5), positive(3, 1)),
    "kronecker diagonal spectral": lambda b: kronecker_diagonal_spectral(b, _spread(2, 3)),
    "stacked kronecker": lambda b: stacked(
        b,
        kronecker(b, positive(3, 13), positive(2, 14)),
        kronecker(b, positive(3, 15), positive(2, 16)),
    ),
    "stacked spectral": lambda b: stacked_spectral(b, _spread(2, 2, 3)),
    "stack of one": lambda b: stacked(b, diagonal(b, _spread(2, 2))),
    "units": lambda b: units(b, positive(2, 0), positive(2, 1), np.diag([0.3, 2.0])),
    "units of one entry": lambda b: units(b, *np.asarray([0.4, 3.0, 1.0]).reshape(3, 1, 1)),
    "units spectral": lambda b: units_spectral(b, _spread(2, 3)),
    "dense": lambda b: dense(b, positive(6, 7), (2, 3)),
    "dense of a vector": lambda b: dense(b, positive(5, 8), (5,)),
    "dense spectral": lambda b: dense_spectral(b, _spread(6), (3, 2)),
    "diagonal": lambda b: diagonal(b, _spread(3, 4)),
    "scaled": lambda b: scaled(b, kronecker_spectral(b, _spread(3, 4)), 0.3 + _spread(3, 4)),
    "block diagonal": lambda b: block_diagonal(
        b,
        kronecker(b, positive(3, 9), positive(2, 10)),
        dense(b, positive(4, 11), (2, 2)),
        diagonal(b, _spread(1, 3)),
    ),
    "flattened": lambda b: flattened(b, positive(8, 12)),
}

_HOLE = np.asarray([[0.0, 2.0, 1.0], [0.5, 0.0, 3.0]])

SINGULAR: dict[str, Maker] = {
    "kronecker, A singular": lambda b: kronecker(b, gram(4, 2, 0), positive(3, 1)),
    "kronecker, G singular": lambda b: kronecker(b, positive(4, 0), gram(3, 1, 1)),
    "kronecker, both singular": lambda b: kronecker(b, gram(5, 3, 0), gram(4, 2, 1)),
    "kronecker, G zero": lambda b: kronecker(b, positive(4, 0), np.zeros((3, 3))),
    "kronecker spectral": lambda b: kronecker_spectral(b, _HOLE),
    "kronecker diagonal, A singular": lambda b: kronecker_diagonal(
        b, np.asarray([0.5, 0.0, 2.0]), positive(3, 1)
    ),
    "kronecker diagonal, G singular": lambda b: kronecker_diagonal(b, _spread(4), gram(3, 1, 1)),
    "kronecker diagonal spectral": lambda b: kronecker_diagonal_spectral(b, _HOLE),
    "stacked, a group dead": lambda b: stacked(
        b,
        kronecker(b, positive(3, 13), positive(2, 14)),
        kronecker(b, positive(3, 15), np.zeros((2, 2))),
    ),
    "stacked spectral": lambda b: stacked_spectral(b, np.stack([_HOLE, 1.0 + _HOLE])),
    "units": lambda b: units(b, gram(2, 1, 3), positive(2, 1), np.zeros((2, 2))),
    "units of one entry": lambda b: units(b, *np.asarray([0.0, 3.0]).reshape(2, 1, 1)),
    "units spectral": lambda b: units_spectral(b, _HOLE),
    "dense": lambda b: dense(b, gram(6, 4, 2), (2, 3)),
    "dense zero": lambda b: dense(b, np.zeros((4, 4)), (2, 2)),
    "dense spectral": lambda b: dense_spectral(b, _HOLE.reshape(-1), (3, 2)),
    "diagonal": lambda b: diagonal(b, _HOLE),
    "scaled": lambda b: scaled(b, kronecker_spectral(b, _HOLE), 0.3 + _spread(2, 3)),
    "block diagonal": lambda b: block_diagonal(
        b,
        kronecker(b, positive(3, 9), positive(2, 10)),
        dense(b, gram(4, 2, 11), (2, 2)),
        diagonal(b, _spread(1, 3)),
    ),
    "flattened": lambda b: flattened(b, gram(8, 5, 12)),
}
