"""Weights are removed, and the others take over what they can."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from kfac_np import trees
from kfac_np.applications.conjugate import conjugate_gradients
from kfac_np.backend import Array, array_namespace
from kfac_np.matrices import BlockDiagonalMatrix, KroneckerSpectral, Matrix, TreeMatrix
from kfac_np.matrices.base import require_damping
from kfac_np.trees import Tree

__all__ = ["compensation", "quadratic"]


def compensation(
    matrix: TreeMatrix,
    w: Tree,
    removed: Tree,
    damping: float = 0.0,
    *,
    tolerance: float = 1e-10,
) -> dict[str, Array]:
    """The update δ that sets weights to zero and moves the others to where the model is least.

    δ minimises ½ δᵀ H δ, H = C + damping · I, among all δ with δ_S = -w_S: jointly for all weights
    S that are removed. For one weight it is -w_q / [H⁻¹]_qq · H⁻¹ e_q.

    Parameters
    ----------
    matrix : TreeMatrix
        C.
    w : dict of path to Array
    removed : dict of path to Array of bool
        S. What is zero already and to stay so belongs to it, too.
    damping : float
    tolerance : float
        ε of `conjugate_gradients`: relative, in the norm δᵀ H δ. The cost is exact to ε².

    Returns
    -------
    dict of path to Array
        δ; exactly -w on S.

    Raises
    ------
    FactorizationError
        H is singular up to rounding.

    References
    ----------
    Hassibi & Stork 1993, eq. 5, for several weights at once.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.matrices import DenseMatrix
    >>> block = DenseMatrix(np.asarray([[2.0, 1.0], [1.0, 2.0]]), (2,))
    >>> C = BlockDiagonalMatrix({"0": block})
    >>> compensation(C, {"0": np.ones(2)}, {"0": np.asarray([True, False])})["0"]
    array([-1. ,  0.5])
    """
    require_damping(damping)
    if isinstance(matrix, BlockDiagonalMatrix) and isinstance(matrix.blocks, dict):
        return {
            path: _compensation(block, w[path], removed[path], damping, tolerance, path)
            for path, block in matrix.blocks.items()
        }
    found: dict[str, Array] = _compensation(matrix, w, removed, damping, tolerance, "all layers")
    return found


def _compensation(
    matrix: Matrix | TreeMatrix,
    w: Tree,
    removed: Tree,
    damping: float,
    tolerance: float,
    place: str,
) -> Tree:
    def gone_of(v: Tree) -> Tree:
        return trees.tree_map(_masked, v, removed)

    def kept_of(v: Tree) -> Tree:
        return trees.tree_map(lambda x, gone: _masked(x, ~gone), v, removed)

    def product(v: Tree) -> Tree:
        return trees.axpy(damping, v, matrix.matvec(v))

    inverse = matrix.power(-1.0, damping)
    near: Callable[[Tree], Tree] | None = None
    if isinstance(matrix, Matrix):
        near = _row_by_row(matrix, removed, damping)
    gone = gone_of(w)
    moved = conjugate_gradients(
        lambda v: kept_of(product(v)),
        kept_of(product(gone)),
        near or (lambda v: kept_of(inverse.matvec(v))),
        tolerance=tolerance,
        what=f"compensation of {place}",
    )
    return trees.axpy(-1.0, gone, moved)


def _masked(x: Array, mask: Array) -> Array:
    xp = array_namespace(x)
    return xp.where(mask, x, xp.zeros_like(x))


def _row_by_row(matrix: Matrix, removed: Array, damping: float) -> Callable[[Array], Array] | None:
    """The inverse of H's own block of each row's kept weights, where these are few.

    A preconditioner: H⁻¹, cut to the kept weights, is a poor one once most weights are gone.
    """
    form = matrix.spectral()
    if not isinstance(form, KroneckerSpectral) or form.U_A is None:
        return None
    xp, kept = array_namespace(removed), ~removed
    if int(xp.count_nonzero(kept)) > math.prod(removed.shape) // 2:
        return None
    values = form.U_G**2 @ (form.values + damping)  # of row o's block, in the eigenbasis of A
    blocks: list[Array] = []
    for o in range(removed.shape[0]):
        (chosen,) = xp.nonzero(kept[o, :])
        r = xp.take(form.U_A, chosen, axis=0)
        blocks.append(xp.linalg.inv((r * values[o, :]) @ r.T) if chosen.shape[0] else r)
    counts = xp.cumulative_sum(xp.astype(kept, xp.int64), axis=1)
    places = xp.where(counts > 0, counts - 1, xp.zeros_like(counts))  # of each weight in its row

    def apply(v: Array) -> Array:
        rows = []
        for o, block in enumerate(blocks):
            if not block.shape[0]:
                rows.append(xp.zeros_like(v[o, :]))
                continue
            solved = block @ v[o, :][kept[o, :]]
            spread = xp.take(solved, places[o, :], axis=0)
            rows.append(_masked(spread, kept[o, :]))
        return xp.stack(rows)

    return apply


def quadratic(matrix: TreeMatrix, delta: Mapping[str, Array]) -> float:
    """½ δᵀ C δ: by how much the quadratic model says that the loss rises.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.matrices import DiagonalMatrix
    >>> C = BlockDiagonalMatrix({"0": DiagonalMatrix(np.asarray([4.0]))})
    >>> quadratic(C, {"0": np.ones(1)})
    2.0
    """
    return 0.5 * float(trees.inner(delta, matrix.matvec(delta)))
