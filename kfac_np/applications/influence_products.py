"""u B⁻¹ v for derivatives u and v of examples, layer by layer, with as little formed as can be."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import final

from kfac_np import trees
from kfac_np.backend import Array, array_namespace
from kfac_np.errors import KfacError
from kfac_np.matrices import (
    BlockDiagonalMatrix,
    DenseMatrix,
    DenseSpectral,
    DiagonalMatrix,
    KroneckerMatrix,
    KroneckerSpectral,
    Matrix,
    TreeMatrix,
)
from kfac_np.statistics import (
    AffineStatistics,
    EmbeddingStatistics,
    GroupedStatistics,
    Statistics,
)

__all__ = ["Factored", "Formed", "Products", "products_of"]

Found = Mapping[str, Statistics]
"""Statistics by path: of N examples, with K vectors each."""
Held = tuple[Array, ...]


class Products(ABC):
    """Inner products uᵀ B⁻¹ v of one block of B, u and v of the statistics of examples.

    The derivatives u of queries are brought into the form that B⁻¹ has them in (`hold`); then they
    meet those of any number of examples (`cross`). Nothing is divided.
    """

    @abstractmethod
    def hold(self, queries: Found) -> Held:
        """Queries as `cross` takes them."""

    @abstractmethod
    def cross(self, held: Held, examples: Found) -> Array:
        """uᵀ B⁻¹ v, shape (K_q · N_q, K, N): vectors of queries before queries."""

    @abstractmethod
    def gram(self, examples: Found) -> Array:
        """v_kᵀ B⁻¹ v_l of the vectors of each example, shape (N, K, K)."""

    @abstractmethod
    def numbers(self, one: Found, rows: int) -> tuple[int, int, int]:
        """Numbers for each example that `hold`, `cross` with so many rows and `gram` work with.

        `one` is the statistics of one example.
        """


@final
@dataclass(frozen=True, eq=False)
class Formed(Products):
    """B⁻¹ is applied to the derivatives of queries, one array of the parameters' size for each.

    Those of examples are formed, some at a time, or not at all, whichever takes less work.

    Attributes
    ----------
    paths : tuple of str
        The parameters of the block.
    inverse : callable
        Derivatives as rows (R, P), parameters flattened and side by side, to B⁻¹ times each.
    """

    paths: tuple[str, ...]
    inverse: Callable[[Array], Array]

    def hold(self, queries: Found) -> Held:
        return (self._solved(self._rows(queries)),)

    def cross(self, held: Held, examples: Found) -> Array:
        (v,) = held
        some = examples[self.paths[0]]
        shape = (v.shape[0], some.num_vectors, some.num_examples)
        xp = array_namespace(v)
        if self._unformed(examples, v.shape[0]):
            each = [some.along(xp.reshape(v[r, :], some.parameter_shape)) for r in range(shape[0])]
            return xp.reshape(xp.stack(each), shape)
        return xp.reshape(v @ self._rows(examples).T, shape)

    def gram(self, examples: Found) -> Array:
        rows = self._rows(examples)
        xp, some = array_namespace(rows), examples[self.paths[0]]
        shape = (some.num_vectors, some.num_examples, rows.shape[1])
        u, v = (
            xp.permute_dims(xp.reshape(x, shape), (1, 0, 2)) for x in (rows, self._solved(rows))
        )
        return u @ xp.matrix_transpose(v)

    def numbers(self, one: Found, rows: int) -> tuple[int, int, int]:
        k = one[self.paths[0]].num_vectors
        formed = k * sum(math.prod(one[path].parameter_shape) for path in self.paths)
        met = k * rows if self._unformed(one, rows) else formed
        return 4 * formed, met, 4 * formed

    def _unformed(self, examples: Found, rows: int) -> bool:
        """Whether `Statistics.along`, a row at a time, is less work than forming derivatives."""
        s = examples[self.paths[0]]
        if len(self.paths) > 1:
            return False
        if isinstance(s, AffineStatistics | GroupedStatistics):
            t, k = s.num_locations, s.num_vectors
            return rows * t <= k * (t + rows)
        return isinstance(s, EmbeddingStatistics)

    def _rows(self, found: Found) -> Array:
        xp = array_namespace(found[self.paths[0]].gradient())
        each = [found[path] for path in self.paths]
        sizes = [math.prod(s.parameter_shape) for s in each]
        rows = [xp.reshape(s.per_example(), (-1, n)) for s, n in zip(each, sizes, strict=True)]
        return rows[0] if len(rows) == 1 else xp.concat(rows, axis=1)

    def _solved(self, rows: Array) -> Array:
        # In double precision, as the curvature is.
        xp = array_namespace(rows)
        return xp.astype(self.inverse(xp.astype(rows, xp.float64)), rows.dtype)


@final
@dataclass(frozen=True, eq=False)
class Factored(Products):
    """B⁻¹ = (U_G ⊗ U_A) diag(W) (U_G ⊗ U_A)ᵀ of an affine layer: no derivative is formed.

    With one location the derivative of an example is g āᵀ, and in the basis it is ĝ âᵀ,
    ĝ = U_Gᵀ g, â = U_Aᵀ ā:

        uᵀ B⁻¹ v = Σ_ij ĝ_ui ĝ_vi W_ij â_uj â_vj.

    Of K-FAC, W = 1/(λ^G_i λ^A_j + λ) is a sum of few products x_i y_j up to rounding (its
    singular values fall geometrically, as those of all such quotients), and for each of them all
    pairs take two small matrix products. Layers with several locations go the way of `Formed`.

    Attributes
    ----------
    path : str
        Of the parameter.
    inverse : KroneckerSpectral
        B⁻¹, in double precision.
    damping : float or None
        λ of B = G ⊗ A + λ I; None where the eigenvalues are no products (EKFAC).

    References
    ----------
    Beckermann & Townsend 2017, "On the singular values of matrices with displacement structure".
    """

    path: str
    inverse: KroneckerSpectral
    damping: float | None

    def hold(self, queries: Found) -> Held:
        s = _single(queries[self.path])
        if s is None:
            return self._formed.hold(queries)
        g, a = self._rotated(s)
        return array_namespace(g).reshape(g, (-1, g.shape[-1])), a

    def cross(self, held: Held, examples: Found) -> Array:
        s = _single(examples[self.path])
        if s is None:
            return self._formed.cross(held, examples)
        (g_q, a_q), (g, a) = held, self._rotated(s)
        xp, (k, n) = array_namespace(g), g.shape[:2]
        rows, queries = g_q.shape[0], a_q.shape[0]
        if (terms := self.sum_of_products(g.dtype)) is None:
            w, rotated = self._weights(g.dtype), AffineStatistics(a[:, None, :], g[:, :, None, :])
            each = [
                rotated.along(w * (g_q[r, :][:, None] * a_q[r % queries, :][None, :]))
                for r in range(rows)
            ]
            return xp.stack(each)
        flat = xp.reshape(g, (k * n, -1))
        total = xp.zeros((rows // queries, queries, k, n), dtype=g.dtype, device=g.device)
        x, y = terms
        for i in range(x.shape[0]):
            of_g = xp.reshape((g_q * x[i, :][None, :]) @ flat.T, total.shape)
            total += of_g * ((a_q * y[i, :][None, :]) @ a.T)[None, :, None, :]
        return xp.reshape(total, (rows, k, n))

    def gram(self, examples: Found) -> Array:
        s = _single(examples[self.path])
        if s is None:
            return self._formed.gram(examples)
        g, a = self._rotated(s)
        xp = array_namespace(g)
        g = xp.permute_dims(g, (1, 0, 2))  # (N, K, d_out)
        return (g * ((a * a) @ self._weights(g.dtype).T)[:, None, :]) @ xp.matrix_transpose(g)

    def numbers(self, one: Found, rows: int) -> tuple[int, int, int]:
        s = _single(one[self.path])
        if s is None:
            return self._formed.numbers(one, rows)
        d_out, d_in = s.parameter_shape
        both = s.num_vectors * d_out + d_in
        return 2 * both, 2 * both + s.num_vectors * max(d_out, 3 * rows), 3 * both

    @cached_property
    def _formed(self) -> Formed:
        return Formed((self.path,), _row_by_row(self.inverse))

    def _rotated(self, s: AffineStatistics) -> tuple[Array, Array]:
        xp, u_a = array_namespace(s.g), self.inverse.U_A
        assert u_a is not None, "of one-hot inputs nothing is factored"
        g, a = s.stacked_g[:, :, 0, :], s.a[:, 0, :]
        return g @ xp.astype(self.inverse.U_G, g.dtype), a @ xp.astype(u_a, a.dtype)

    def _weights(self, dtype: object) -> Array:
        return array_namespace(self.inverse.values).astype(self.inverse.values, dtype)

    def sum_of_products(self, dtype: object) -> tuple[Array, Array] | None:
        """x (r, d_out) and y (r, d_in) with W_ij = Σ_r x_ri y_rj, where that is less work."""
        if self.damping is None:
            return None
        xp = array_namespace(self.inverse.values)
        x, y, s = self._decomposed
        number = int(xp.count_nonzero(s > xp.finfo(dtype).eps * s[0]))
        d_out, d_in = self.inverse.values.shape
        if 2 * number * (d_out + d_in) > d_out * d_in:
            return None
        return xp.astype(x[:number, :], dtype), xp.astype(y[:number, :], dtype)

    @cached_property
    def _decomposed(self) -> tuple[Array, Array, Array]:
        """All terms, the largest first, and their sizes.

        What rounding and the terms left out may change is measured by the derivatives: in units
        in which each direction of them, ĝ_i and â_j, is of about the size that the curvature
        says, every entry of W is at most about 1.
        """
        w = self.inverse.values
        xp = array_namespace(w)
        curvature = 1.0 / w  # λ^G_i λ^A_j + λ
        top = xp.max(curvature)
        g = xp.max(curvature, axis=1) / xp.sqrt(top)
        a = xp.max(curvature, axis=0) / xp.sqrt(top)
        u, s, vh = xp.linalg.svd(w * g[:, None] * a[None, :], full_matrices=False)
        return u.T * (s[:, None] / g[None, :]), vh / a[None, :], s


def products_of(matrix: TreeMatrix, damping: Mapping[str, float]) -> list[Products]:
    """The blocks of B = C + damping · I, inverted.

    Parameters
    ----------
    matrix : TreeMatrix
        C, which acts on dicts {path: array}.
    damping : mapping
        λ of each parameter.

    Raises
    ------
    FactorizationError
        A block is singular up to rounding.
    """
    if not isinstance(matrix, BlockDiagonalMatrix):
        return [_whole(matrix, damping)]
    return [_of_block(path, block, damping[path]) for path, block in trees.items(matrix.blocks)]


def _of_block(path: str, block: Matrix, damping: float) -> Products:
    try:
        inverse = block.power(-1.0, damping)
    except KfacError as error:
        raise error.within(f"layer {path}") from None
    if isinstance(inverse, KroneckerSpectral) and inverse.U_A is not None:
        return Factored(path, inverse, damping if isinstance(block, KroneckerMatrix) else None)
    return Formed((path,), _row_by_row(inverse))


def _whole(matrix: TreeMatrix, damping: Mapping[str, float]) -> Formed:
    dense, diagonal = matrix.to_dense(), matrix.diagonal()
    xp = array_namespace(dense)
    added = [xp.full_like(xp.reshape(d, (-1,)), damping[path]) for path, d in diagonal.items()]
    size = dense.shape[0]
    shift = xp.eye(size, dtype=dense.dtype, device=dense.device) * xp.concat(added)[None, :]
    return Formed(tuple(diagonal), _row_by_row(DenseMatrix(dense + shift, (size,)).power(-1.0)))


def _row_by_row(inverse: Matrix) -> Callable[[Array], Array]:
    """`Matrix.matvec` of each row (R, P)."""
    if isinstance(inverse, DenseSpectral):
        dense = inverse.to_dense()
        return lambda rows: rows @ dense
    shape = inverse.operand_shape

    def apply(rows: Array) -> Array:
        xp = array_namespace(rows)
        v = xp.reshape(rows, (-1, *shape))
        if isinstance(inverse, KroneckerSpectral | DiagonalMatrix):  # of any leading axes
            return xp.reshape(inverse.matvec(v), rows.shape)
        return xp.reshape(
            xp.stack([inverse.matvec(v[r, ...]) for r in range(v.shape[0])]), rows.shape
        )

    return apply


def _single(s: Statistics) -> AffineStatistics | None:
    """Statistics with one location, whose derivatives are of rank 1."""
    return s if isinstance(s, AffineStatistics) and s.num_locations == 1 else None
