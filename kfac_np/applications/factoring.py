"""Layers as products of two smaller ones, chosen in the metric of their Kronecker factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from kfac_np.backend import Array, array_namespace, eigh
from kfac_np.errors import CurvatureError
from kfac_np.matrices import KroneckerMatrix, KroneckerSpectral, Matrix

__all__ = ["Factoring", "eigendamage_costs", "in_eigenbasis", "weighted_svd"]


@final
@dataclass(frozen=True, eq=False)
class Factoring:
    """W̄ ≈ P Q for every rank: which directions there are, and what it costs to drop each.

    Attributes
    ----------
    costs : Array, shape (r,)
        What dropping each direction adds to the model; the costs of several add up where
        directions are orthogonal in the metric, as those of `weighted_svd` are.
    outer, inner : Array, shapes (d_out, r) and (r, d_in)
        P and Q with all directions.

    Examples
    --------
    >>> import numpy as np
    >>> f = Factoring(np.asarray([3.0, 1.0]), np.eye(2), np.ones((2, 3)))
    >>> f.keep([0])[0].shape, f.keep([0])[1].shape
    ((2, 1), (1, 3))
    """

    costs: Array
    outer: Array
    inner: Array

    def keep(self, directions: Sequence[int]) -> tuple[Array, Array]:
        """P and Q with some directions only."""
        xp = array_namespace(self.outer)
        chosen = xp.asarray(list(directions), device=self.outer.device)
        return xp.take(self.outer, chosen, axis=1), xp.take(self.inner, chosen, axis=0)


def weighted_svd(matrix: Matrix, w: Array) -> Factoring:
    """The singular value decomposition in the metric of G ⊗ A: the best P Q of every rank.

    E = W̄ - P Q of rank r has the least ½ tr(G E A Eᵀ) where G^½ P Q A^½ is the truncated
    decomposition of G^½ W̄ A^½; each direction dropped costs ½ σ². Directions that A does not see
    stay as they are in W̄; an eigenvalue of G that is zero up to rounding is raised to rounding.

    Parameters
    ----------
    matrix : KroneckerMatrix
    w : Array, shape (d_out, d_in)

    Returns
    -------
    Factoring
        Directions by falling σ.

    Raises
    ------
    CurvatureError
        The matrix is no Kronecker product: there is no closed form.

    References
    ----------
    Eckart & Young 1936, in the inner product tr(G E A Eᵀ).

    Examples
    --------
    >>> import numpy as np
    >>> C = KroneckerMatrix(A=np.diag([1.0, 100.0]), G=np.eye(2))
    >>> weighted_svd(C, np.diag([2.0, 1.0])).costs  # the smaller weight matters more
    array([50.,  2.])
    """
    if not isinstance(matrix, KroneckerMatrix):
        raise CurvatureError(
            f"weighted_svd: expected a Kronecker product (KFACBlock), got {type(matrix).__name__}: "
            "the best low rank has a closed form in no other metric; fit K-FAC, or use "
            'in_eigenbasis (remove="eigenvectors")'
        )
    xp = array_namespace(w)
    root_a, _ = _roots(matrix.A)
    root_g, inverse_g = _roots(matrix.G)
    u, s, _ = xp.linalg.svd(root_g @ w @ root_a, full_matrices=False)
    return Factoring(0.5 * s * s, inverse_g @ u, u.T @ root_g @ w)


def _roots(m: Array) -> tuple[Array, Array]:
    """m^½ and m^(-½), symmetric."""
    xp = array_namespace(m)
    values, u = eigh(m)
    floor = xp.finfo(values.dtype).eps * values.shape[0] * xp.max(xp.abs(values))
    values = xp.where(values > floor, values, floor)
    root = xp.sqrt(xp.where(values > 0.0, values, xp.ones_like(values)))
    return (u * root) @ u.T, (u / root) @ u.T


def eigendamage_costs(matrix: Matrix, w: Array) -> Array:
    """What each entry of U_Gᵀ W̄ U_A costs: its square times its eigenvalue, halved.

    In the Kronecker eigenbasis the curvature is diagonal, so that weights do not compensate for
    each other. K-FAC's eigenvalues are λ^G_i λ^A_j; those of EKFAC are measured.

    Parameters
    ----------
    matrix : KroneckerMatrix or KroneckerSpectral
    w : Array, shape (d_out, d_in)

    Returns
    -------
    Array, shape (d_out, d_in)
        Rows and columns in the order of the eigenvectors of G and A.

    References
    ----------
    Wang et al. 2019, arXiv:1905.05934, §4.1.

    Examples
    --------
    >>> import numpy as np
    >>> C = KroneckerMatrix(A=np.diag([1.0, 2.0]), G=np.eye(1))
    >>> eigendamage_costs(C, np.asarray([[2.0, 2.0]]))
    array([[2., 4.]])
    """
    form = _eigenform(matrix)
    rotated = form.U_G.T @ w @ form.U_A
    return 0.5 * rotated * rotated * form.values


def in_eigenbasis(matrix: Matrix, w: Array) -> Factoring:
    """EigenDamage: drop eigenvectors of G, or of A where these are fewer.

    A row of U_Gᵀ W̄ U_A (a column) costs the sum of `eigendamage_costs` over it; costs of several
    rows add up. Kept rows I make the layer U_G[:, I] · (U_G[:, I]ᵀ W̄).

    Parameters
    ----------
    matrix : KroneckerMatrix or KroneckerSpectral
    w : Array, shape (d_out, d_in)

    Returns
    -------
    Factoring

    Raises
    ------
    CurvatureError
        The matrix has no Kronecker eigenbasis.

    Notes
    -----
    For K-FAC `weighted_svd` drops less at the same rank. With EKFAC's eigenvalues there is no
    closed form, and this is what there is.

    References
    ----------
    Wang et al. 2019, arXiv:1905.05934, §4.2. The three factors there are two here: the one in the
    middle is multiplied into its smaller neighbour.

    Examples
    --------
    >>> import numpy as np
    >>> C = KroneckerMatrix(A=np.diag([1.0, 2.0]), G=np.eye(1))
    >>> in_eigenbasis(C, np.asarray([[2.0, 2.0]])).costs
    array([6.])
    """
    form, costs = _eigenform(matrix), eigendamage_costs(matrix, w)
    xp = array_namespace(w)
    if w.shape[0] <= w.shape[1]:
        return Factoring(xp.sum(costs, axis=1), form.U_G, form.U_G.T @ w)
    assert form.U_A is not None
    return Factoring(xp.sum(costs, axis=0), w @ form.U_A, form.U_A.T)


def _eigenform(matrix: Matrix) -> KroneckerSpectral:
    form = matrix.spectral() if isinstance(matrix, KroneckerMatrix) else matrix
    if not isinstance(form, KroneckerSpectral) or form.U_A is None:
        raise CurvatureError(
            "EigenDamage: expected a curvature with a Kronecker eigenbasis (KFACBlock or EKFAC), "
            f"got {type(matrix).__name__}"
        )
    return form


FACTORINGS: dict[str, Callable[[Matrix, Array], Factoring]] = {
    "rank": weighted_svd,
    "eigenvectors": in_eigenbasis,
}
