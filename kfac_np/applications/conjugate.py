"""Linear systems with a matrix that is known by its products."""

from __future__ import annotations

from collections.abc import Callable

from kfac_np import trees
from kfac_np.errors import FactorizationError
from kfac_np.trees import Tree

__all__ = ["conjugate_gradients"]

Operator = Callable[[Tree], Tree]


def conjugate_gradients(
    product: Operator,
    b: Tree,
    preconditioner: Operator,
    *,
    tolerance: float = 1e-10,
    iterations: int = 1000,
    what: str = "conjugate gradients",
) -> Tree:
    """Solve C x = b, C symmetric positive semi-definite and b in its range.

    Parameters
    ----------
    product, preconditioner : callable
        C v, and M v with M ≈ C⁻¹ symmetric positive definite.
    b : tree of Array
    tolerance : float
        On √(rᵀ M r) of the residual r, relative to that of b: about the relative error of x in
        the norm xᵀ C x.
    iterations : int
        The most to do.
    what : str
        For the message of the error.

    Raises
    ------
    FactorizationError
        The tolerance was not reached.

    References
    ----------
    Hestenes & Stiefel 1952, "Methods of conjugate gradients for solving linear systems", §3.

    Examples
    --------
    >>> import numpy as np
    >>> x = conjugate_gradients(lambda v: (4.0 * v[0],), (np.ones(2),), lambda v: v)
    >>> x[0]
    array([0.25, 0.25])
    """
    x, r = trees.zeros_like(b), b
    z = preconditioner(r)
    p, rz = z, float(trees.inner(r, z))
    first = rz
    for _ in range(iterations):
        if not rz > tolerance**2 * first:
            return x
        q = product(p)
        curvature = float(trees.inner(p, q))
        if not curvature > 0.0:
            break
        alpha = rz / curvature
        x, r = trees.axpy(alpha, p, x), trees.axpy(-alpha, q, r)
        z = preconditioner(r)
        rz, old = float(trees.inner(r, z)), rz
        p = trees.axpy(rz / old, p, z)
    reached = (max(rz, 0.0) / first) ** 0.5
    raise FactorizationError(
        f"{what}: expected a relative error of {tolerance:g} within {iterations} iterations, "
        f"got {reached:.2g}; give more damping"
    )
