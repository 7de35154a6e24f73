"""What it costs to remove weights, rows or columns of a parameter, by the quadratic model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from kfac_np import trees
from kfac_np.backend import Array, array_namespace
from kfac_np.errors import InputError
from kfac_np.matrices import DiagonalMatrix, KroneckerSpectral, Matrix, TreeMatrix
from kfac_np.matrices.base import require_damping
from kfac_np.trees import Tree
from kfac_np.validation import is_integer, require_one_of

__all__ = ["METHODS", "Method", "group_costs", "one_by_one", "weight_costs"]

Method = Literal["obs", "obd", "magnitude"]
METHODS = ("obs", "obd", "magnitude")


def weight_costs(
    matrix: Matrix | TreeMatrix, w: Tree, method: Method = "obs", damping: float = 0.0
) -> Tree:
    """What it costs to set each weight alone to zero, H = C + damping · I.

    "obs": w_q² / (2 [H⁻¹]_qq), the other weights moving to where the model is least. "obd":
    w_q² H_qq / 2, the others left as they are. "magnitude": w_q² / 2. The gradient is taken as
    zero.

    Parameters
    ----------
    matrix : Matrix or TreeMatrix
        C, of one parameter or of several.
    w : Array or tree of Array
        What it acts on.

    Returns
    -------
    Array or tree of Array, like w

    References
    ----------
    LeCun, Denker & Solla 1990, "Optimal brain damage", eq. 5; Hassibi & Stork 1993, "Second order
    derivatives for network pruning: optimal brain surgeon", eq. 5.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.matrices import DenseMatrix
    >>> C = DenseMatrix(np.asarray([[2.0, 1.0], [1.0, 2.0]]), (2,))
    >>> weight_costs(C, np.ones(2)), weight_costs(C, np.ones(2), "obd")
    (array([0.75, 0.75]), array([1., 1.]))
    """
    require_one_of("method", method, METHODS)
    require_damping(damping)
    if method == "magnitude":
        return trees.tree_map(lambda x: 0.5 * x * x, w)
    if method == "obd":
        return trees.tree_map(lambda x, h: 0.5 * x * x * (h + damping), w, matrix.diagonal())
    inverse = matrix.power(-1.0, damping).diagonal()
    return trees.tree_map(lambda x, h: 0.5 * x * x / h, w, inverse)


def group_costs(
    matrix: Matrix,
    w: Array,
    groups: Sequence[Sequence[int]],
    axis: int = 0,
    method: Method = "obs",
    damping: float = 0.0,
) -> Array:
    """What it costs to set whole rows (axis 0) or columns (axis 1) of a parameter to zero.

    With S the weights of a group, "obs" is w_Sᵀ ([H⁻¹]_SS)⁻¹ w_S / 2, "obd" w_Sᵀ H_SS w_S / 2 and
    "magnitude" ‖w_S‖² / 2. Kronecker and diagonal matrices are never written out.

    Parameters
    ----------
    matrix : Matrix
        C, of one parameter.
    w : Array, shape (d_out, d_in)
    groups : sequence of sequences of int
        Rows or columns that go together: a unit is a row, an input channel one column or several.

    Returns
    -------
    Array, shape (number of groups,)

    References
    ----------
    Hassibi & Stork 1993; Wang et al. 2019, arXiv:1905.05934, §3.2 (whole filters).

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.matrices import KroneckerMatrix
    >>> C = KroneckerMatrix(A=np.eye(3), G=np.asarray([[2.0, 1.0], [1.0, 2.0]]))
    >>> group_costs(C, np.ones((2, 3)), [[0], [1]])
    array([2.25, 2.25])
    """
    require_one_of("method", method, METHODS)
    require_damping(damping)
    if w.ndim != 2:
        raise InputError(f"w: expected a matrix with rows and columns, got shape {tuple(w.shape)}")
    xp = array_namespace(w)
    if method == "magnitude":
        return xp.stack([0.5 * xp.sum(_part(w, g, axis) ** 2) for g in groups])
    spectral = matrix.spectral()
    form = spectral.power(-1.0 if method == "obs" else 1.0, damping)
    if isinstance(form, DiagonalMatrix):
        each = w * w / form.values if method == "obs" else w * w * form.values
        found = [xp.sum(_part(each, g, axis)) for g in groups]
    elif isinstance(form, KroneckerSpectral) and form.U_A is not None:
        sides = (form.values, form.U_A, form.U_G, w)
        if axis == 0:
            sides = (form.values.T, form.U_G, form.U_A, w.T)
        found = [_kronecker_form(g, *sides, solve=method == "obs") for g in groups]
    else:
        dense = form.to_dense()
        found = [_dense_form(dense, w, g, axis, solve=method == "obs") for g in groups]
    return 0.5 * xp.stack(found)


def _part(w: Array, group: Sequence[int], axis: int) -> Array:
    xp = array_namespace(w)
    return xp.take(w, xp.asarray(group, device=w.device), axis=axis)


def _kronecker_form(
    group: Sequence[int], values: Array, u_a: Array, u_g: Array, w: Array, *, solve: bool
) -> Array:
    """w_Sᵀ B w_S or w_Sᵀ B⁻¹ w_S of the columns in a group, B the matrix's own block of them.

    In the eigenbasis of G, B falls apart into a block R diag(values_k) Rᵀ for each eigenvector k,
    R the rows of U_A that belong to the columns.
    """
    xp = array_namespace(w)
    r = _part(u_a, group, 0)
    v = u_g.T @ _part(w, group, 1)
    blocks = (values[:, None, :] * r[None, :, :]) @ r.T
    other = xp.linalg.solve(blocks, v[..., None]) if solve else blocks @ v[..., None]
    return xp.sum(v * other[..., 0])


def _dense_form(dense: Array, w: Array, group: Sequence[int], axis: int, *, solve: bool) -> Array:
    xp = array_namespace(w)
    numbers = xp.reshape(xp.arange(dense.shape[0], device=w.device), w.shape)
    chosen = xp.reshape(_part(numbers, group, axis), (-1,))
    v = xp.reshape(_part(w, group, axis), (-1,))
    block = xp.take(xp.take(dense, chosen, axis=0), chosen, axis=1)
    other = xp.linalg.solve(block, v[:, None])[:, 0] if solve else block @ v
    return xp.sum(v * other)


def one_by_one(
    matrix: Matrix, w: Array, count: int, damping: float = 0.0
) -> tuple[Array, list[int], list[float]]:
    """Optimal brain surgeon as it was published: a weight at a time, the inverse updated.

    Each time the cheapest of the remaining weights goes, the others move, and the inverse becomes
    that of the remaining ones: H⁻¹ - H⁻¹ e_q e_qᵀ H⁻¹ / [H⁻¹]_qq. The n × n inverse is written out.

    Parameters
    ----------
    matrix : Matrix
        C, of one parameter with n weights.
    w : Array
    count : int
        How many weights go, at most n.

    Returns
    -------
    w : Array
        What is left, with zeros.
    order : list of int
        The weights removed, as positions in the flattened w.
    costs : list of float
        What each removal added to the model; their sum is ½ δᵀ (C + damping · I) δ of the whole.

    References
    ----------
    Hassibi & Stork 1993, §2.

    Examples
    --------
    >>> import numpy as np
    >>> from kfac_np.matrices import DiagonalMatrix
    >>> one_by_one(DiagonalMatrix(np.asarray([1.0, 8.0])), np.asarray([2.0, 1.0]), 1)
    (array([0., 1.]), [0], [2.0])
    """
    xp, shape, size = array_namespace(w), w.shape, math.prod(w.shape)
    if not is_integer(count) or not 0 <= count <= size:
        raise InputError(f"one_by_one count: expected 0..{size}, got {count!r}")
    inverse = matrix.power(-1.0, damping).to_dense()
    v = xp.reshape(w, (size,))
    left = xp.ones(size, dtype=xp.bool, device=w.device)
    numbers = xp.arange(size, device=w.device)
    order, costs = [], []
    for _ in range(count):
        diagonal = xp.where(left, xp.linalg.diagonal(inverse), 1.0)
        cost = xp.where(left, 0.5 * v * v / diagonal, xp.inf)
        q = int(xp.argmin(cost))
        order.append(q)
        costs.append(float(cost[q]))
        left = left & (numbers != q)
        column = inverse[:, q]
        v = xp.where(left, v - v[q] / column[q] * column, 0.0)
        inverse = inverse - column[:, None] * column[None, :] / column[q]
    return xp.reshape(v, shape), order, costs
